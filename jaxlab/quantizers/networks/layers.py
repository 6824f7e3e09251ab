"""What the kernels of a network are: which of their axes are outputs, and which layers integers can run.

A parameter tree does not say it. `(4, 8, 16)` may be a one-dimensional convolution, a map to 8 heads of 16
features, or 4 experts: other scales each time that go by the name 'per channel'. So the modules are asked, in
one abstract trace of the model (`find_layers`); only where there is no model the tree has to do
(`tree_layer`), and what it leaves open is an error.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax import linen as nn
from flax import traverse_util

from jaxlab.models.intercept import Site
from jaxlab.quantizers.networks.batches import trace_calls

PyTree = Any
Shape = tuple[int, ...]

WINDOW = 31  # longest window that an array of four axes is taken for without its module
VECTORS = ('bias', 'scale', 'mean', 'var')  # of one axis, unless they are stacked
TABLES = re.compile(r'.*(embed|embedding|table|token)s?')  # of no layer, whatever their axes
NO_FORM = 'only nn.Dense, nn.DenseGeneral and nn.Conv have an integer form'


class Layer(NamedTuple):
  """A module with a kernel; static and hashable.

  Attributes:
    name: of its class.
    channels: axes of the kernel in the parameter tree that have scales of their own 'per channel', counted
      from the end: outputs, and what is stacked. None: not known.
    stacked: those of `channels` along which `nn.scan` or `nn.vmap` stacks one kernel a layer or expert.
    spatial: whether it is a convolution, which pads with 0.
    in_float: why integers cannot run it; None: they can.
  """

  name: str
  channels: tuple[int, ...] | None
  stacked: tuple[int, ...] = ()
  spatial: bool = False
  in_float: str | None = None


def find_layers(
  model: nn.Module, variables: Mapping[str, PyTree], /, *args: Any, **kwargs: Any
) -> dict[str, Layer]:
  """Returns the layers with a kernel that `model(*args, **kwargs)` calls, by path, in order of execution.

  Traces abstractly: no memory, no computation. Arguments may be `jax.ShapeDtypeStruct`s.
  """
  found: dict[str, Layer] = {}
  flat = traverse_util.flatten_dict(dict(variables['params']), sep='/')

  def visit(site: Site, call: Any, *args: Any, **kwargs: Any) -> Any:
    if (layer := layer_of(site, flat, args, kwargs)) is not None:
      found.setdefault(site.path, layer)
    return call(*args, **kwargs)

  trace_calls(model, variables, (args, kwargs), visit)
  return found


def layer_of(
  site: Site, flat: Mapping[str, Any], args: tuple = (), kwargs: Mapping[str, Any] = {}
) -> Layer | None:
  """Returns the layer that is called, None for a module without a kernel.

  Args:
    site: of the call.
    flat: the parameters of the whole model, by path.
    args: of the call.
    kwargs: of the call.

  Raises:
    ValueError: if the kernel is stacked along an axis that its parameters do not tell.
  """
  module, scope = site.module, site.module.scope
  if not scope.has_variable('params', 'kernel'):
    return None
  prefix = f'{site.path}/' if site.path else ''
  names = [path.removeprefix(prefix) for path in flat if path.startswith(prefix)]
  shapes = {
    name: (tuple(flat[f'{prefix}{name}'].shape), tuple(scope.get_variable('params', name).shape))
    for name in names
    if '/' not in name and scope.has_variable('params', name)
  }
  stacked = _stacked_axes(site.path, shapes)
  shape, ndim = shapes['kernel'][0], len(shapes['kernel'][0])
  outputs = _outputs(module, len(shapes['kernel'][1]), args, kwargs)
  channels = None
  if outputs is not None:
    rest = [axis for axis in range(ndim) if axis - ndim not in stacked]
    channels = tuple(sorted((*stacked, *(rest[axis] - len(shape) for axis in outputs))))
  spatial = isinstance(module, nn.Conv | nn.ConvTranspose | nn.ConvLocal)
  in_float = 'its kernel is stacked' if stacked else why_in_float(module)
  return Layer(type(module).__name__, channels, stacked, spatial, in_float)


def _outputs(
  module: nn.Module, ndim: int, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[int, ...] | None:
  """Returns the axes of a module's own kernel that are outputs, counted from the end; None: not known."""
  if isinstance(module, nn.DenseGeneral):
    count, batch = _length(module.features), _length(module.batch_dims)
    return tuple(range(-count, 0)) + tuple(range(-ndim, -ndim + batch))
  if isinstance(module, nn.ConvTranspose):
    return (-2,) if module.transpose_kernel else (-1,)
  if isinstance(module, nn.Einsum):
    text = module.einsum_str or kwargs.get('einsum_str') or (args[1] if len(args) > 1 else None)
    return _einsum_outputs(text)
  if isinstance(module, nn.Dense | nn.Conv | nn.ConvLocal) or ndim == 2:
    return (-1,)
  return None


def summed_axes(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
  """Returns the axes of a layer's input that its kernel sums over, its channels; by default the last.

  Args:
    module: the layer.
    args: of its call.
    kwargs: of its call.
  """
  if isinstance(module, nn.DenseGeneral):
    return tuple(module.axis) if isinstance(module.axis, Sequence) else (module.axis,)
  if isinstance(module, nn.Einsum):
    text = module.einsum_str or kwargs.get('einsum_str') or (args[1] if len(args) > 1 else None)
    if text is not None and '.' not in text and '->' in text:
      operands, result = text.replace(' ', '').split('->')
      own, kernel = operands.split(',')
      summed = [i for i, letter in enumerate(own) if letter in kernel and letter not in result]
      return tuple(summed) or (-1,)
  return (-1,)


def _einsum_outputs(text: str | None) -> tuple[int, ...] | None:
  """Returns the axes of the second operand of an einsum that are in its result."""
  if text is None or '.' in text or '->' not in text:
    return None
  operands, result = text.replace(' ', '').split('->')
  kernel = operands.split(',')[1]
  return tuple(i - len(kernel) for i, letter in enumerate(kernel) if letter in result)


def why_in_float(module: nn.Module) -> str | None:
  """Returns why integers cannot run a module with a kernel; None: they can."""
  kinds = [kind for kind in (nn.Dense, nn.DenseGeneral, nn.Conv) if isinstance(module, kind)]
  if not kinds:
    return f'{NO_FORM}, it is a {type(module).__name__}'
  if type(module).__call__ is not kinds[0].__call__:
    return (
      f'{type(module).__name__} has a call of its own, other than that of nn.{kinds[0].__name__}'
    )
  if isinstance(module, nn.DenseGeneral) and _length(module.batch_dims):
    return 'it has batch_dims'
  if isinstance(module, nn.Conv) and module.mask is not None:
    return 'it has a mask'
  if (
    isinstance(module, nn.Conv)
    and not isinstance(module.kernel_size, int)
    and len(module.kernel_size) > 3
  ):
    return 'it has more than three spatial axes'
  return None


def _length(value: Any) -> int:
  """Returns how many numbers an argument of Linen holds, one or several."""
  return len(value) if isinstance(value, Sequence) else 1


def _stacked_axes(path: str, shapes: Mapping[str, tuple[Shape, Shape]]) -> tuple[int, ...]:
  """Returns the axes, counted from the end, along which a module's kernel is stacked in the tree.

  It is at one place for all parameters of the module, counted from the front or from the end; of several
  places that fit, it is the first, the usual one.

  Args:
    path: of the module.
    shapes: in the tree and in the module, by parameter.
  """
  count = len(shapes['kernel'][0]) - len(shapes['kernel'][1])
  if count == 0:
    return ()
  # From the front, then from the end; a parameter that is not stacked, but shared, says nothing.
  told = [pair for pair in shapes.values() if len(pair[0]) - len(pair[1]) == count]
  for from_end in (False, True):
    fits = [set(_removable(*pair, from_end)) for pair in told]
    if count > 0 and (common := set.intersection(*fits)):
      axes, ndim = min(common) if not from_end else max(common), len(shapes['kernel'][0])
      return tuple(axis - (0 if from_end else ndim) for axis in axes)
  tree, own = shapes['kernel']
  raise ValueError(
    f'{path!r}: its kernel is {own} in the module and {tree} in the parameters; along which axis it is '
    f'stacked cannot be told.'
  )


def _removable(tree: Shape, own: Shape, from_end: bool) -> list[tuple[int, ...]]:
  ndim = len(tree)
  found = []
  for axes in itertools.combinations(range(ndim), ndim - len(own)):
    if tuple(n for i, n in enumerate(tree) if i not in axes) == own:
      found.append(tuple(axis - ndim if from_end else axis for axis in axes))
  return found


def check_channels(path: str, layer: Layer, shape: Shape) -> tuple[int, ...]:
  """Returns the channel axes of a layer; raises ValueError if they are not known."""
  if layer.channels is None:
    raise ValueError(
      f'{path!r} is a {layer.name} with a kernel {tuple(shape)}: which of its axes are outputs, with a scale '
      f"of their own, is not known. Say it in the rule, e.g. Rule({path!r}, 'kernel', 4, axes=(-1,)) for "
      f'[..., in, out], or leave the layer out.'
    )
  return layer.channels


def check_unstacked(layers: Mapping[str, Layer], method: str) -> None:
  """Raises ValueError if kernels are stacked; names them."""
  stacked = [path for path, layer in layers.items() if layer.stacked]
  if stacked:
    raise ValueError(
      f'The kernels of {", ".join(stacked[:3])} are stacked (nn.scan): {method} quantizes the plain network, '
      f'with variables of `unstack_blocks`. Stacks, also those of experts (nn.vmap), are quantized by ptq.'
    )


def channel_shape(shape: Shape, channels: tuple[int, ...]) -> Shape:
  """Returns the shape of scales of `channels` that broadcasts against a kernel, without leading ones.

  >>> channel_shape((4, 8, 16), (-2, -1)), channel_shape((3, 3, 8, 4), (-2,))
  ((8, 16), (8, 1))
  """
  ndim = len(shape)
  first = min(axis % ndim for axis in channels) if channels else ndim
  return tuple(n if i - ndim in channels else 1 for i, n in enumerate(shape) if i >= first)


def as_matrix(kernel: Any, channels: tuple[int, ...]) -> Any:
  """Returns a kernel as `[inputs, outputs]`, the outputs in the order of its channel axes."""
  ndim = kernel.ndim
  inputs = [axis for axis in range(ndim) if axis - ndim not in channels]
  order = (*inputs, *(axis % ndim for axis in channels))
  rows = math.prod(kernel.shape[axis] for axis in inputs)
  return kernel.transpose(order).reshape(rows, -1)


def from_matrix(matrix: Any, shape: Shape, channels: tuple[int, ...]) -> Any:
  """Returns the kernel of a shape whose `as_matrix` is given."""
  ndim = len(shape)
  inputs = [axis for axis in range(ndim) if axis - ndim not in channels]
  order = (*inputs, *(axis % ndim for axis in channels))
  moved = matrix.reshape([shape[axis] for axis in order])
  return moved.transpose([order.index(axis) for axis in range(ndim)])


def tree_layer(flat: Mapping[str, Any], path: str) -> Layer:
  """Returns what a parameter tree alone tells of the kernel of a module.

  - beside a bias: the outputs are the last axes, of its shape, perhaps those of each of a stack;
  - a kernel in a subtree all of whose arrays, vectors included, begin with one common axis is stacked along
    it;
  - else `[in, out]`, or `[height, width, in, out]` for windows of up to 31.

  Args:
    flat: parameters by path.
    path: of the module.

  Raises:
    ValueError: for kernels that may be several things.
  """
  prefix = f'{path}/' if path else ''
  shape = tuple(flat[f'{prefix}kernel'].shape)
  bias = tuple(flat[f'{prefix}bias'].shape) if f'{prefix}bias' in flat else None
  stacked = _in_stack(flat, path)
  fits = []
  if bias is None:
    fits = [_plain_outputs(shape[1:] if stacked else shape)]
  else:
    alone = _outputs_of_bias(shape, bias)
    each = (
      _outputs_of_bias(shape[1:], bias[1:]) if bias[:1] == shape[:1] and len(bias) > 1 else None
    )
    fits = [each] if stacked else [fit for fit in (alone, each) if fit is not None]
    stacked = stacked or (alone is None and each is not None)
  if len(fits) != 1 or fits[0] is None:
    raise ValueError(
      f'What the axes of the kernel {shape} of {path!r} are cannot be told from the parameters: hand in '
      f'layers=find_layers(model, variables, inputs), or say it in the rule, e.g. axes=(-1,) for '
      f'[..., in, out].'
    )
  axes = (-len(shape),) if stacked else ()
  return Layer('?', (*axes, *fits[0]), axes, len(shape) - len(axes) > 2)


def _plain_outputs(shape: Shape) -> tuple[int, ...] | None:
  conv = len(shape) == 4 and max(shape[:2]) <= WINDOW
  return (-1,) if len(shape) == 2 or conv else None


def _outputs_of_bias(shape: Shape, bias: Shape) -> tuple[int, ...] | None:
  if len(bias) < len(shape) and shape[-len(bias) :] == bias:
    return tuple(range(-len(bias), 0))
  if len(bias) == 1 and len(shape) > 2 and shape[-2] == bias[0]:
    return (-2,)  # a transposed convolution with transpose_kernel=True
  return None


def _in_stack(flat: Mapping[str, Any], path: str) -> bool:
  """Whether a module lies in a subtree in which everything, vectors too, begins with one common axis."""
  names = path.split('/') if path else []
  for depth in range(len(names)):
    prefix = ''.join(f'{name}/' for name in names[: depth + 1])
    shapes = {name: tuple(leaf.shape) for name, leaf in flat.items() if name.startswith(prefix)}
    modules = {name.rpartition('/')[0] for name in shapes}
    vectors = [len(s) for name, s in shapes.items() if name.split('/')[-1] in VECTORS]
    common = all(len(s) > 1 for s in shapes.values()) and len({s[0] for s in shapes.values()}) == 1
    if common and vectors and len(modules) > 1:
      return True
  return False
