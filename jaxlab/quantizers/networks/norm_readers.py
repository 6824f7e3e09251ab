"""Who reads a normalization: what its rescaling (RepQ, SmoothQuant) makes up for, or must leave alone."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.blockwise import Skeleton
from jaxlab.models.intercept import Site, apply, first_argument, raise_unmatched
from jaxlab.models.main_arrays import array_leaves, is_array
from jaxlab.quantizers.networks import operands
from jaxlab.quantizers.networks.batches import Call, trace_calls
from jaxlab.quantizers.networks.quantized import COLLECTION
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any
Pairs = Sequence[tuple[str, str]]
PathPairs = tuple[tuple[str, str], ...]


class Readers(NamedTuple):
  """Norms and the layers that read them.

  Attributes:
    pairs: (norm, layer), all layers of one norm together.
    repeated: norms that are called more than once: their readers see different values.
  """

  pairs: PathPairs
  repeated: frozenset[str]


def norm_dense_pairs(
  params: PyTree, pairs: Pairs, *, shifted: bool = True
) -> tuple[tuple[str, str], ...]:
  """Returns the paths of all (LayerNorm, dense layer) in `params` that `pairs` names.

  Args:
    params: parameter tree.
    pairs: (norm, dense) as regular expressions of paths below a common parent, e.g.
      `('norm1', 'attention/qkv')`; each must name something.
    shifted: whether the norms have to have a bias.

  Raises:
    ValueError: if one of `pairs` matches nothing, or names a norm without bias that has to have one.

  >>> import numpy as np
  >>> norm = {'scale': np.ones(2), 'bias': np.zeros(2)}
  >>> fc1 = {'kernel': np.ones((2, 3)), 'bias': np.zeros(3)}
  >>> norm_dense_pairs({'blocks_0': {'norm2': norm, 'mlp': {'fc1': fc1}}}, [('norm2', 'mlp/fc1')])
  (('blocks_0/norm2', 'blocks_0/mlp/fc1'),)
  """
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  norms = {
    path.removesuffix('scale').rstrip('/') for path in flat if path.split('/')[-1] == 'scale'
  }
  denses = [
    path.removesuffix('kernel').rstrip('/') for path in flat if path.split('/')[-1] == 'kernel'
  ]
  found = []
  for norm_pattern, dense_pattern in pairs:
    matches = []
    for dense in denses:
      if match := re.fullmatch(rf'(?P<parent>(.*/)?)({dense_pattern})', dense):
        parent = match['parent']
        matches += [
          (norm, dense)
          for norm in sorted(norms)
          if norm.startswith(parent) and re.fullmatch(norm_pattern, norm[len(parent) :])
        ]
    if not matches:
      raise_unmatched([norm_pattern, dense_pattern], [*norms, *denses], 'pair', 'norm and layer')
    for norm, _ in matches:
      if shifted and f'{norm}/bias' not in flat:
        raise ValueError(
          f'The norm {norm!r} has no bias (RMSNorm): it cannot take the shift. Leave it out of the pairs; '
          f'its layer then keeps one range a tensor.'
        )
    found += matches
  return tuple(found)


def layer_norm_pairs(
  anatomy: Anatomy, params: PyTree, *, shifted: bool = True
) -> tuple[tuple[str, str], ...]:
  """Returns the norms and their readers, but for the head; if `shifted`, of norms that have a bias alone."""
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  return tuple(
    (norm.path, reader)
    for norm in anatomy.norms
    for reader in norm.readers
    if f'{norm.path}/{"bias" if shifted else "scale"}' in flat and reader not in anatomy.head
  )


def all_readers(
  model: nn.Module, variables: Mapping[str, PyTree], call: Call, pairs: PathPairs
) -> Readers:
  """Returns `pairs`, and all other layers that are given the output of one of their norms as it is.

  Traces abstractly. What reads a norm behind other arithmetic is not seen here.

  Args:
    model: any Linen module.
    variables: its variables.
    call: its arguments.
    pairs: (norm, layer) by path.

  Raises:
    ValueError: if another reader is a layer whose kernel cannot absorb a scale of its inputs, or a reader is
      called again with something else than the norm.
  """
  readers: dict[str, dict[str, None]] = {}
  for norm, layer in pairs:
    readers.setdefault(norm, {})[layer] = None
  calls: dict[str, int] = {}
  sources: dict[str, list[str | None]] = {}
  outputs: list[tuple[Any, str]] = []

  def visit(site: Site, call: Any, *args: Any, **kwargs: Any) -> Any:
    calls[site.path] = calls.get(site.path, 0) + 1
    if site.module.scope.has_variable('params', 'kernel') and (args or kwargs):
      x, _ = first_argument(site, args, kwargs)
      norm = next((norm for y, norm in outputs if y is x), None)
      sources.setdefault(site.path, []).append(norm)
      if norm is not None and site.path not in readers[norm]:
        if not reads_channels(site.module):
          raise ValueError(
            f'{site.path!r} ({type(site.module).__name__}) reads the norm {norm!r}, too, and cannot absorb a '
            f'scale of its channels: leave {norm!r} out of the pairs (pairs=, or its readers in the anatomy).'
          )
        readers[norm][site.path] = None
    y = call(*args, **kwargs)
    if site.path in readers and is_array(y):
      outputs.append((y, site.path))
    return y

  trace_calls(model, variables, call, visit)
  found = tuple((norm, layer) for norm, own in readers.items() for layer in own)
  for norm, layer in found:
    if calls.get(layer, 0) > 1 and any(source != norm for source in sources.get(layer, ())):
      raise ValueError(
        f'{layer!r} is called {calls[layer]} times, not always on the norm {norm!r} that it is paired with: '
        f'rescaling its kernel would be wrong for the other calls. Leave {norm!r} out of the pairs (pairs=, '
        f'or its readers in the anatomy).'
      )
  return Readers(found, frozenset(norm for norm in readers if calls.get(norm, 0) > 1))


def reads_channels(module: nn.Module) -> bool:
  """Returns whether the first axis of a module's kernel are the channels of its input, and nothing else."""
  if isinstance(module, nn.DenseGeneral):
    axes = module.axis if isinstance(module.axis, Sequence) else (module.axis,)
    return tuple(axes) == (-1,) and not module.batch_dims
  return isinstance(module, nn.Dense)


def check_function(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  call: Call,
  rescaled: Callable[[Iterable[str]], tuple[PyTree, dict[str, Array]]],
  norms: Iterable[str],
) -> None:
  """Raises ValueError if rescaling norms makes another function of the float network; names them.

  Both run with matmuls in full precision: with the bfloat16 products that TPUs (and TF32 that GPUs) take for
  float32, rescaled factors would be rounded elsewhere, and the outputs move by more than the bound. What is
  traced passes unseen.

  Args:
    model: any Linen module.
    variables: its variables.
    call: its arguments.
    rescaled: `norms -> (parameters with these norms rescaled, biases of layers that have none)`.
    norms: all that are rescaled.
  """
  if not norms or not all(map(is_concrete, array_leaves((dict(variables), call)))):
    return
  skeleton = Skeleton.of(call)

  @jax.jit
  def run(variables, leaves):
    args, kwargs = skeleton.fill(leaves)
    with jax.default_matmul_precision('highest'):
      out = apply(model, variables, *args, hooks=operands.operand_hooks(), **kwargs)
    return [leaf for leaf in array_leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]

  @jax.jit
  def distance(expected, found):
    wide = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in zip(expected, found)]
    most = [jnp.max(jnp.abs(a - b)) / (jnp.max(jnp.abs(a)) + 1e-30) for a, b in wide]
    return jnp.max(jnp.stack([jnp.zeros(()), *most]))

  leaves = array_leaves(call)
  expected = run({**variables, COLLECTION: {}}, leaves)

  def moved(norms: Iterable[str]) -> float:
    params, biases = rescaled(norms)
    given = {**variables, 'params': params, COLLECTION: operands.collection({}, {}, biases)}
    return float(distance(expected, run(given, leaves)))

  narrow = [leaf.dtype for leaf in jax.tree.leaves(variables['params'])]
  narrow += [leaf.dtype for leaf in expected]
  epsilon = max(float(jnp.finfo(d).eps) for d in narrow if jnp.issubdtype(d, jnp.floating))
  bound = max(1e-3, 16 * epsilon)
  if not moved(norms) > bound:
    return
  found = {norm: own for norm in norms if (own := moved([norm])) > bound}
  shown = ', '.join(f'{norm!r} (by {own:.2g} of the largest)' for norm, own in found.items())
  raise ValueError(
    f'Rescaling {shown or ", ".join(map(repr, norms))} moves the outputs of the float network: besides the '
    f'layers paired with it something else reads the norm. Leave it out of the pairs (pairs=, or its readers '
    f'in the anatomy); its layers then keep one range a tensor.'
  )
