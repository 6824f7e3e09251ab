"""Networks run with real integers: codes for kernels, int32 accumulators, the float kernels gone.

`integer_network` turns a network whose layers have quantized kernels and inputs (of `percentile_ptq`, `repq`,
`gptq_ptq` or `lsq`, perhaps compensated) into

- the collection `'integers'`, at each layer that runs in integers: `kernel`, a `QuantizedArray` (a byte a
  code, or two codes a byte up to 4 bits, unpacked inside the compiled call), and `input`,
  `{scale, zero_point, low, high}`;
- `params` without those kernels;
- hooks, the same for all networks and for blocks cut out of them, that run such a layer as
  `s_x s_w sum (q_x - z_x)(q_w - z_w) + bias`, the sum exact in int32. The layer's own call never happens, so
  that nothing asks for its kernel.

The rest is as in the fake-quantized network: norms, activations, residual sums and softmax in float, and
attention's two products, which have no weights, as float products of fake-quantized operands (a sum of
log-sqrt2 codes is no integer sum). Layers that cannot be run in integers stay as they are; `skipped` says
why.

A layer differs from its fake-quantized form by float rounding and in one more point: its codes have a whole
zero point. Where that of the input is fractional (RepQ-ViT's merged ones) it is rounded, which moves the
clipping bounds by at most half a step of the input; elements between the bounds keep their values. Behind a
layer, a value on a rounding tie may fall to either side.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.linen.linear import canonicalize_padding

from jaxlab.models.intercept import Hook, Site, first_argument
from jaxlab.quantizers.networks import operands
from jaxlab.quantizers.networks.layers import Layer, why_in_float
from jaxlab.quantizers.networks.quantized import (
  NO_EXTENT,
  Quantized,
  check_quantized,
  join_reasons,
)
from jaxlab.quantizers.networks.storage import load_quantized, read_notes, save_quantized
from jaxlab.quantizers.numerics.affine import AffineQuantizer
from jaxlab.quantizers.numerics.integers import integer_conv, integer_dot
from jaxlab.quantizers.numerics.storage import QuantizedArray, pack_codes

Array = jax.Array
PyTree = Any

COLLECTION = 'integers'
AFFINE = {'scale', 'zero_point', 'low', 'high'}


def integer_hooks() -> tuple[Hook, ...]:
  """Returns the hooks that run a network by its collections `'integers'` and `'quantization'`.

  Layers without codes run by `operand_hooks`. There is no gradient through codes.

  Raises (when the model is applied):
    ValueError: if the variables have no collection `'integers'`, or a layer with codes is no `nn.Dense`,
      `nn.DenseGeneral` or `nn.Conv`, has `batch_dims` or a `mask`.
  """
  return (Hook('.*', call=_run_site, collection=COLLECTION), *operands.operand_hooks())


def integer_network(quantized: Quantized) -> Quantized:
  """Returns a quantized network with integers for kernels; see the module's docstring.

  A layer becomes integers if both its kernel and its input have affine constants in `'quantization'`, or
  learned steps. It stays in float, with the reason in `skipped`, if it has not, or if

  - the input's range has no extent (such inputs are not quantized), or is found anew for each token;
  - it is another module than `nn.Dense`, `nn.DenseGeneral` and `nn.Conv` (of one to three spatial axes, with
    any padding), has a call of its own, `batch_dims` or a `mask`;
  - the int32 accumulator could overflow;
  - it is a convolution whose input range, widened to hold the 0 of the padding, takes more than 8 bits.

  A channel of a kernel whose scale is 0 becomes the code 1 with its constant for the scale.

  Args:
    quantized: of any method here, or of `compensate`; arrays concrete. (Kernels in bfloat16 have been rounded
      once more than their codes.)

  Returns:
    The network, without its float kernels: it is compensated before, not after.

  Raises:
    ValueError: for what is no `Quantized`, a network in integers, or one in which no layer has a quantized
      input and kernel, or can be run in integers.
  """
  check_quantized(quantized, 'integer_network')
  if COLLECTION in quantized.variables:
    raise ValueError('The network is in integers already.')
  variables, hooks = quantized.unbind()
  params = traverse_util.flatten_dict(dict(variables['params']), sep='/')
  constants = traverse_util.flatten_dict(dict(variables[operands.COLLECTION]), sep='/')
  if not any(re.search('(^|/)input/', path) for path in constants):
    raise ValueError(
      'integer_network multiplies integers by integers, but the inputs of layers are not quantized here: '
      "give rules for 'input' to percentile_ptq, repq, gptq_ptq or lsq (ptq quantizes kernels and outputs)."
    )
  integers: dict[str, Any] = {}
  skipped = {}
  for path in _kernel_paths(params):
    known = quantized.layers.get(path)
    layer = _integer_layer(params[_join(path, 'kernel')], *_constants(constants, path), known)
    if isinstance(layer, str):
      skipped[path] = layer
      continue
    integers |= {_join(path, name): value for name, value in layer.items()}
    del params[_join(path, 'kernel')]
    gone = tuple(_join(path, f'{operand}/') for operand in ('kernel', 'input'))
    constants = {name: leaf for name, leaf in constants.items() if not name.startswith(gone)}
  if not integers:
    reasons = ''.join(f'\n  {path}: {reason}' for path, reason in list(skipped.items())[:8])
    raise ValueError(f'No layer can be run in integers:{reasons}')
  variables |= {
    'params': traverse_util.unflatten_dict(params, sep='/'),
    operands.COLLECTION: traverse_util.unflatten_dict(constants, sep='/'),
    COLLECTION: traverse_util.unflatten_dict(integers, sep='/'),
  }
  skipped = join_reasons(skipped, quantized.skipped)
  changes = {'exact': None, 'prepare': None, 'skipped': skipped}
  hooks = (integer_hooks()[0], *hooks)
  return dataclasses.replace(quantized, variables=variables, hooks=hooks, **changes)


def save_integer_network(path: str | os.PathLike, network: Quantized) -> int:
  """Writes the network's variables as one safetensors file; returns its size in bytes.

  The layout is that of `save_quantized`: codes are `integers/fc/kernel.codes`.

  Raises:
    ValueError: for a network that is not in integers.
  """
  check_quantized(network, 'save_integer_network')
  if COLLECTION not in network.variables:
    raise ValueError('The network is not in integers: save what integer_network returns.')
  notes = {'skipped': dict(network.skipped)}
  return save_quantized(path, network.unbind()[0], notes=notes)


def load_integer_network(
  path: str | os.PathLike,
  model: nn.Module,
  *,
  hooks: Sequence[Hook] | None = None,
  **kwargs: Any,
) -> Quantized:
  """Returns the network that `save_integer_network` wrote.

  Args:
    path: of the file.
    model: the module.
    hooks: of the network; None: `integer_hooks()`. Those of a compensated network are the user's to keep.
    **kwargs: passed to the model, e.g. `train=False`.

  Raises:
    ValueError: for another file, or one without integers.
  """
  variables, notes = load_quantized(path), read_notes(path)
  if COLLECTION not in variables:
    raise ValueError(
      f'{os.fspath(path)!r} holds no {COLLECTION!r}: it was not written by save_integer_network.'
    )
  # Empty trees leave no trace in a file.
  variables = {'params': {}, operands.COLLECTION: {}, **variables}
  skipped = notes.get('skipped', {})
  hooks = integer_hooks() if hooks is None else hooks
  return Quantized(model, variables, hooks=hooks, kwargs=kwargs, skipped=skipped)


def export_network(
  network: Quantized, x: Any, *, platforms: Sequence[str] | None = None, **kwargs: Any
) -> jax.export.Exported:
  """Returns the network as StableHLO, a function of its input alone, the integers inside.

  `exported.serialize()` gives the bytes, `jax.export.deserialize(data).call(x)` runs them without this
  library and without the model's code.

  Args:
    network: in integers, or fake-quantized.
    x: an input, or its `jax.ShapeDtypeStruct`; dimensions may be symbolic (`jax.export.symbolic_shape`).
    platforms: `'cpu'`, `'cuda'`, `'tpu'`, ...; None: the present one.
    **kwargs: passed to the model.
  """
  # The attribute `jax.export` exists only once the module is imported.
  from jax import export

  return export.export(jax.jit(lambda x: network(x, **kwargs)), platforms=platforms)(x)


def _run_site(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  if not site.path and COLLECTION not in site.module.variables:
    raise ValueError(
      f'The variables have no collection {COLLECTION!r}: call what `integer_network` returns, '
      f'or pass the variables of its `unbind()` (a block: its slice of every collection, which may be empty).'
    )
  if site.has('kernel'):
    return _run_layer(site, first_argument(site, args, kwargs)[0])
  return call(*args, **kwargs)


def _run_layer(site: Site, x: Array) -> Array:
  module, kernel, own = site.module, site.read('kernel'), site.read('input')
  if (reason := why_in_float(module)) is not None:
    raise ValueError(
      f'{site.path!r} ({type(module).__name__}) has no integer form: {reason}. Give its kernel no bits by a '
      f'rule.'
    )
  wide = jnp.promote_types(x.dtype, own['scale'].dtype)
  codes = jnp.round(x.astype(wide) / own['scale']) + own['zero_point']
  codes = jnp.clip(codes, own['low'], own['high']).astype(jnp.uint8)
  multiply = integer_dot
  if isinstance(module, nn.DenseGeneral | nn.Conv):
    form = _conv if isinstance(module, nn.Conv) else _dense_general
    multiply = functools.partial(form, module)
  acc = multiply(codes, kernel.integer_codes(), own['zero_point'], kernel.zero_point)
  y = acc.astype(wide) * (own['scale'] * kernel.scale)
  dtypes = [x.dtype]
  if module.scope.has_variable('params', 'bias'):
    bias = module.scope.get_variable('params', 'bias')
    y, dtypes = y + bias, [x.dtype, bias.dtype]
  return y.astype(jnp.result_type(*dtypes) if module.dtype is None else module.dtype)


def _dense_general(
  module: nn.DenseGeneral, x: Array, kernel: Array, x_zero_point: Array, zero_point: Array
) -> Array:
  axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
  count = len(axes)
  x = jnp.moveaxis(x, axes, range(-count, 0))
  inputs = int(np.prod(kernel.shape[:count]))
  acc = integer_dot(
    x.reshape(*x.shape[:-count], inputs),
    kernel.reshape(inputs, -1),
    x_zero_point,
    jnp.broadcast_to(zero_point, kernel.shape[count:]).reshape(-1),
  )
  return acc.reshape(*x.shape[:-count], *kernel.shape[count:])


def _conv(
  module: nn.Conv, x: Array, kernel: Array, x_zero_point: Array, zero_point: Array
) -> Array:
  rank = kernel.ndim - 2
  dilation, padding = (
    _each(module.kernel_dilation, rank),
    canonicalize_padding(module.padding, rank),
  )
  windows = [(size - 1) * d + 1 for size, d in zip(kernel.shape, dilation)]
  batch = x.shape[: -rank - 1]
  x = x.reshape(-1, *x.shape[-rank - 1 :])
  if padding in ('CIRCULAR', 'REFLECT'):
    edges = [(0, 0), *(((size - 1) // 2, size // 2) for size in windows), (0, 0)]
    x = jnp.pad(x, edges, mode={'CIRCULAR': 'wrap', 'REFLECT': 'reflect'}[padding])
    padding = 'VALID'
  elif padding == 'CAUSAL':
    padding = [(windows[0] - 1, 0)]
  acc = integer_conv(
    x,
    kernel,
    x_zero_point,
    zero_point,
    strides=_each(module.strides, rank),
    padding=padding,
    dilation=dilation,
    input_dilation=_each(module.input_dilation, rank),
    groups=module.feature_group_count,
  )
  return acc.reshape(*batch, *acc.shape[1:])


def _each(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
  value = 1 if value is None else value
  return (value,) * rank if isinstance(value, int) else tuple(value)


def _integer_layer(
  kernel: Array,
  kernel_constants: Mapping[str, Array],
  input_constants: Mapping[str, Array],
  layer: Layer | None,
) -> dict[str, Any] | str:
  """Returns `{kernel, input}` of the collection, or why the layer stays in float.

  Args:
    kernel: fake-quantized.
    kernel_constants: of the collection `'quantization'`.
    input_constants: the same.
    layer: what it is; None: not known, so that it is found out when it runs.
  """
  for what, constants in (('kernel', kernel_constants), ('input', input_constants)):
    if not constants:
      return f'its {what} is not quantized'
    if 'epsilon' in constants:
      return f'its {what} has a scale a token, which is found in float at each call'
    if not set(constants) >= AFFINE or (what == 'input' and np.size(constants['scale']) != 1):
      return f'its {what} has no affine quantizer a {"channel" if what == "kernel" else "tensor"}'
  if 'group' in kernel_constants:
    return 'its kernel has a scale a group of inputs'
  if layer is not None and layer.in_float is not None:
    return layer.in_float
  # Channels are the last axes, as the shape of the scales says.
  scales = np.shape(kernel_constants['scale'])
  if scales != np.shape(kernel)[np.ndim(kernel) - len(scales) :]:
    return 'its kernel has no scale an output'
  # float64: distances between codes are exact there for every zero point of float32.
  own = {name: np.asarray(value, np.float64).item() for name, value in input_constants.items()}
  if own['scale'] == 0:
    return NO_EXTENT.format('input')
  lowest, highest = (own[name] - np.round(own['zero_point']) for name in ('low', 'high'))
  bottom, top = lowest, highest
  if kernel.ndim > 2 if layer is None else layer.spatial:
    bottom, top = min(lowest, 0), max(highest, 0)
  if top - bottom > 255:
    return (
      f'with the 0 of its padding its input takes {int(top - bottom) + 1} codes, more than 8 bits'
    )
  levels = np.asarray(kernel_constants['high'] - kernel_constants['low']).item() + 1
  bits = round(np.log2(levels))
  codes, scale, zero_point, steps = _encode(kernel, dict(kernel_constants), bits=bits)
  farthest = max(abs(lowest), abs(highest))
  inputs = kernel.size // max(np.size(scale), 1)
  if max(farthest, farthest * float(steps), inputs * 255**2) >= 2**31:
    return 'its int32 accumulator could overflow'
  axis = -1 if len(scales) == 1 else tuple(range(-len(scales), 0))
  quantizer = AffineQuantizer(bits, 'asymmetric', 'channel', axis)
  return {
    'kernel': QuantizedArray(codes, scale, zero_point, quantizer, tuple(kernel.shape)),
    'input': {
      'scale': jnp.reshape(input_constants['scale'], ()),
      'zero_point': jnp.int32(-bottom),
      'low': jnp.uint8(lowest - bottom),
      'high': jnp.uint8(highest - bottom),
    },
  }


@functools.partial(jax.jit, static_argnames='bits')
def _encode(
  kernel: Array, constants: dict[str, Array], bits: int
) -> tuple[Array, Array, Array, Array]:
  """Returns codes as they are stored, scale, zero point and `max_o sum_i |q_io - z_o|`."""
  scale, zero_point = constants['scale'], constants['zero_point']
  flat = scale == 0
  codes = jnp.round(kernel.astype(scale.dtype) / jnp.where(flat, 1, scale)) + zero_point
  codes = jnp.where(flat, 1, jnp.clip(codes, constants['low'], constants['high']))
  zero_point = jnp.where(flat, 0, zero_point)
  inputs = tuple(range(kernel.ndim - scale.ndim))
  first = kernel[(0,) * len(inputs)].astype(scale.dtype)
  scale = jnp.where(flat, first, scale)
  steps = jnp.max(jnp.sum(jnp.abs(codes - zero_point), inputs))
  codes = codes.astype(jnp.uint8)
  return pack_codes(codes, bits), scale, zero_point, steps


def _kernel_paths(params: Mapping[str, Array]) -> list[str]:
  return [
    name.removesuffix('kernel').rstrip('/') for name in params if name.split('/')[-1] == 'kernel'
  ]


def _join(path: str, name: str) -> str:
  return f'{path}/{name}' if path else name


def _constants(flat: Mapping[str, Array], path: str) -> tuple[dict[str, Array], dict[str, Array]]:
  """Returns the constants of a layer's kernel and input."""
  both = []
  for operand in ('kernel', 'input'):
    prefix = _join(path, operand) + '/'
    own = {n.removeprefix(prefix): v for n, v in flat.items() if n.startswith(prefix)}
    both.append(operands.affine_form(own))
  return both[0], both[1]
