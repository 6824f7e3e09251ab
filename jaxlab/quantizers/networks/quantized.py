"""A quantized network: what every method here returns, called as the model is, and handed to the next method.

  quantized = repq(model, variables, images, edge_rules(4, 4))
  better = compensate(quantized, batches, QwT())
  logits = jax.jit(lambda network, x: network(x))(integer_network(better), images)

Linen ignores variable collections that it does not know: `model.apply` would run the variables of a quantized
network in float and say nothing. So they are handed out only together with the hooks that they need.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax
import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.core import FrozenDict

from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.intercept import Hook, apply, check_linen
from jaxlab.models.main_arrays import array_leaves
from jaxlab.quantizers.networks.layers import Layer
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any

COLLECTION = 'quantization'
OPERANDS = ('kernel', 'embedding', 'input', 'output')
NO_EXTENT = 'the range of its {} has no extent'
OWN = (
  COLLECTION,
  'compensation',
  'integers',
  'lsq',
  'lsq_codes',
  'learned_ranges',
  'range_bits',
)


@jax.tree_util.register_pytree_with_keys_class
class Collections:
  """Variable collections by name, `variables['params']`; no mapping, so that Linen refuses them."""

  def __init__(self, tree: Mapping[str, PyTree]):
    self.tree = dict(tree)

  def __getitem__(self, name: str) -> PyTree:
    return self.tree[name]

  def __contains__(self, name: str) -> bool:
    return name in self.tree

  def __repr__(self) -> str:
    return f'Collections({", ".join(self.tree)})'

  def items(self) -> None:
    """Raises TypeError: Linen asks for this."""
    raise TypeError(
      'These are variables of a quantized network, which `model.apply` would run in float: call the network '
      'itself, `quantized(x)`. To run them under hooks of your own: `variables, hooks = quantized.unbind()`, '
      'then `jaxlab.models.apply(model, variables, x, hooks=hooks)`.'
    )

  def tree_flatten_with_keys(self) -> tuple[list, tuple[str, ...]]:
    """Returns the collections in order of their names."""
    names = tuple(sorted(self.tree))
    return [(jax.tree_util.DictKey(name), self.tree[name]) for name in names], names

  @classmethod
  def tree_unflatten(cls, names: tuple[str, ...], trees: Iterable[PyTree]) -> 'Collections':
    """Returns the collections `names`."""
    return cls(zip(names, trees))


class Report(flax.struct.PyTreeNode):
  """What a compensation did, one entry a compensated module, in order of execution.

  Attributes:
    paths: of the modules.
    error_before: mean squared error on the calibration data against the teacher, float64 `[modules]`.
    error_after: the same of the compensated module, with the arithmetic of `dtype`.
    r2: of the fit; for QwT-v2 `1 - error_after / error_before`.
    skipped: whether the gate left the module as it is.
    parameters: values that were added.
    multiply_adds: that were added, for one example.
  """

  paths: tuple[str, ...] = flax.struct.field(pytree_node=False)
  error_before: np.ndarray
  error_after: np.ndarray
  r2: np.ndarray
  skipped: np.ndarray
  parameters: np.ndarray
  multiply_adds: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Static:
  """What of a network is compared and hashed, not traced."""

  model: nn.Module
  hooks: tuple[Hook, ...]
  kwargs: FrozenDict
  anatomy: Anatomy | None
  prepare: Callable[..., Any] | None
  skipped: FrozenDict
  rounded: FrozenDict
  layers: FrozenDict

  def __hash__(self):
    try:
      return hash((self.model, self.hooks, self.kwargs, self.prepare))
    except TypeError:  # a module with lists for fields
      return hash(type(self.model))


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Quantized:
  """A quantized network, and the float network that it approximates: a pytree whose leaves are its arrays.

  Attributes:
    model: the Linen module, as it was.
    variables: of the network, collections of quantizers and compensations included.
    exact: in which leaves the float network differs, `{collection: {...}}`, so that no array is held twice;
      None: the float kernels are gone (`integer_network`).
    hooks: static; of `jaxlab.models.apply`.
    kwargs: static; of every call of the model, unless it says otherwise, e.g. `train=False`. Arrays that a
      model takes are given at each call.
    anatomy: the names of the model's parts; None: what `models.anatomy` says.
    prepare: static; a function of the variables before every call (LSQ quantizes kernels there); or None.
    report: of `compensate`; else None.
    skipped: what was to be quantized and stays in float, by path, and why: operands that rules name, layers
      of `integer_network`.
    rounded: layers that `gptq_ptq` rounded to nearest, by path, and why.
    layers: static; what the layers with a kernel are (`find_layers`), by path.
  """

  model: nn.Module
  variables: Collections
  exact: PyTree | None = None
  hooks: tuple[Hook, ...] = ()
  kwargs: Mapping[str, Any] = FrozenDict()
  anatomy: Anatomy | None = None
  prepare: Callable[[dict[str, PyTree]], dict[str, PyTree]] | None = None
  report: Report | None = None
  skipped: Mapping[str, str] = FrozenDict()
  rounded: Mapping[str, str] = FrozenDict()
  layers: Mapping[str, Layer] = FrozenDict()

  def __post_init__(self):
    static = {name: value for name, value in self.kwargs.items() if not array_leaves(value)}
    found = {'hooks': tuple(self.hooks), 'kwargs': FrozenDict(static)}
    names = ('skipped', 'rounded', 'layers')
    found |= {name: FrozenDict(getattr(self, name)) for name in names}
    if isinstance(self.variables, Mapping):
      found['variables'] = Collections(self.variables)
    for name, value in found.items():
      object.__setattr__(self, name, value)

  @classmethod
  def of(
    cls,
    model: nn.Module,
    variables: Mapping[str, PyTree],
    float_variables: Mapping[str, PyTree],
    hooks: Iterable[Hook],
    **fields: Any,
  ) -> 'Quantized':
    """Returns the network of these variables under `hooks`, next to its float network.

    The hooks have to leave the float network alone: where a collection of the quantizers holds nothing for a
    module, they do nothing.

    Args:
      model: any Linen module.
      variables: of the quantized network.
      float_variables: of the float network.
      hooks: of both.
      **fields: see the attributes.
    """
    known = traverse_util.flatten_dict(dict(variables))
    floats = traverse_util.flatten_dict(dict(float_variables))
    own = {
      path: leaf
      for path, leaf in floats.items()
      if path[0] not in OWN and known.get(path) is not leaf
    }
    skipped = join_reasons(fields.pop('skipped', {}), reasons_of_values(variables))
    return cls(
      model, variables, traverse_util.unflatten_dict(own), hooks, skipped=skipped, **fields
    )

  @property
  def float_variables(self) -> Collections:
    """The variables of the float network, collections of quantizers empty but for biases that `repq` moved.

    Raises:
      ValueError: if the float kernels are gone.
    """
    if self.exact is None:
      raise ValueError(
        'This network holds integers alone, its float kernels are gone: do what needs the float network '
        '(compensate, in_float) before integer_network.'
      )
    flat = traverse_util.flatten_dict(self.variables.tree)
    kept = {
      path: leaf
      for path, leaf in flat.items()
      if path[0] not in OWN or (path[0] == COLLECTION and path[-1] == 'bias')
    }
    tree = traverse_util.unflatten_dict({**kept, **traverse_util.flatten_dict(self.exact)})
    return Collections({**{name: {} for name in self.variables.tree}, **tree})

  def in_float(self) -> 'Quantized':
    """Returns the float network: equal, as a function, to the one that was quantized."""
    return dataclasses.replace(self, variables=self.float_variables, exact={}, report=None)

  def unbind(self) -> tuple[dict[str, PyTree], tuple[Hook, ...]]:
    """Returns `(variables, hooks)` for `jaxlab.models.apply(model, variables, x, hooks=hooks)`.

    For those who add hooks of their own, or train: `model.apply` would run these variables in float.
    """
    variables = dict(self.variables.tree)
    return (self.prepare(variables) if self.prepare else variables), self.hooks

  def update(self, **collections: PyTree) -> 'Quantized':
    """Returns the network with these variable collections in place of its own, e.g. `params=params`."""
    unknown = sorted(set(collections) - set(self.variables.tree))
    if unknown:
      raise ValueError(
        f'The network has no collection {", ".join(map(repr, unknown))}; it has '
        f'{", ".join(self.variables.tree)}.'
      )
    return dataclasses.replace(self, variables={**self.variables.tree, **collections})

  def __repr__(self) -> str:
    kept = ', '.join(self._in_float())
    kept = f', in float: {kept}' if kept else ''
    return f'Quantized({type(self.model).__name__}, {self.variables!r}{kept})'

  def _in_float(self) -> dict[str, str]:
    return join_reasons(self.skipped, reasons_of_values(self.variables.tree))

  def operands(self) -> dict[str, dict[str, int | None]]:
    """Returns what is quantized: `{path: {operand: bits}}`, operands `'kernel'`, `'input'`, `'output'`.

    Bits are None where they are traced, or differ within a stack of layers.
    """
    return quantized_operands(self.variables.tree)

  def summary(self) -> str:
    """Returns in words what is quantized, and, a line each, what is not as it was to be, and why."""
    counts: dict[tuple[str, int | None], int] = {}
    for own in self.operands().values():
      for operand, bits in own.items():
        counts[operand, bits] = counts.get((operand, bits), 0) + 1
    order = sorted(counts, key=lambda key: (OPERANDS.index(key[0]), key[1] or 0))
    parts = [
      f'{counts[key]} {key[0]}{"s" * (counts[key] > 1)} of {key[1] or "?"} bits' for key in order
    ]
    lines = [', '.join(parts) or 'no constants of quantizers']
    lines += [f'{path} in float: {why}' for path, why in self._in_float().items()]
    lines += [f'{path} rounded to nearest: {why}' for path, why in self.rounded.items()]
    return '\n'.join(lines)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Returns `model(*args, **kwargs)` of the quantized network.

    Args:
      *args: of the model.
      **kwargs: of the model, over the network's own `kwargs`; and of Linen's `apply` (`mutable`, `rngs`).
    """
    variables, hooks = self.unbind()
    return apply(self.model, variables, *args, hooks=hooks, **{**self.kwargs, **kwargs})

  def tree_flatten_with_keys(self) -> tuple[list, _Static]:
    """Returns the arrays, and all that is static."""
    names = ('variables', 'exact', 'report')
    children = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names]
    return children, _Static(*(getattr(self, f.name) for f in dataclasses.fields(_Static)))

  @classmethod
  def tree_unflatten(cls, static: _Static, children: Iterable[PyTree]) -> 'Quantized':
    """Returns the network of these arrays."""
    arrays = dict(zip(('variables', 'exact', 'report'), children))
    return cls(**arrays, **{f.name: getattr(static, f.name) for f in dataclasses.fields(static)})


def quantized_operands(variables: Mapping[str, PyTree]) -> dict[str, dict[str, int | None]]:
  """Returns `{path: {operand: bits}}` of the variables of a quantized network; see `Quantized.operands`."""
  flat: dict[str, Any] = {}
  for name in (COLLECTION, 'lsq_codes', 'integers'):
    own = traverse_util.flatten_dict(dict(variables.get(name, {})), sep='/')
    flat |= {path: leaf for path, leaf in own.items() if path not in flat or name == 'integers'}
  learned = {}  # bits of operands with learned ranges or steps
  for name in ('range_bits', 'activation_bits'):
    own = traverse_util.flatten_dict(dict(variables.get(name, {})), sep='/')
    learned |= {path: leaf for path, leaf in own.items() if path.rpartition('/')[2] in OPERANDS}
  flat |= learned
  found: dict[str, dict[str, int | None]] = {}
  for path, leaf in flat.items():
    module, name = path.rpartition('/')[::2]
    if (quantizer := getattr(leaf, 'quantizer', None)) is not None:  # integers
      found.setdefault(module, {})[name] = quantizer.bits
    elif path in learned:
      found.setdefault(module, {})[name] = _bits(leaf, None)
    elif name in ('high', 'bits'):
      owner, _, operand = module.rpartition('/')
      scale = flat.get(f'{module}/scale')
      if _is_zero(scale):
        continue
      found.setdefault(owner, {})[operand] = _bits(leaf, flat.get(f'{module}/low'))
  return found


def _bits(high: Array, low: Array | None) -> int | None:
  if not (is_concrete(high) and (low is None or is_concrete(low))):
    return None
  bits = np.asarray(high, np.float64)
  if low is not None:
    bits = np.log2(bits - np.asarray(low, np.float64) + 1)
  return int(np.round(bits.flat[0])) if np.all(bits == bits.flat[0]) else None


def reasons_of_values(variables: Mapping[str, PyTree]) -> dict[str, str]:
  """Returns the modules with an operand whose scale is 0: it stays in float. Traced ones pass unseen."""
  found: dict[str, str] = {}
  flat = traverse_util.flatten_dict(dict(variables.get(COLLECTION, {})), sep='/')
  for path, leaf in flat.items():
    module, _, name = path.rpartition('/')
    owner, _, operand = module.rpartition('/')
    if name == 'scale' and operand in OPERANDS and f'{module}/bits' not in flat and _is_zero(leaf):
      found = join_reasons(found, {owner: NO_EXTENT.format(operand)})
  return found


def _is_zero(scale: Array | None) -> bool:
  return scale is not None and is_concrete(scale) and bool(np.any(np.asarray(scale) == 0))


def join_reasons(first: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
  """Returns the reasons of both by path, those of one path joined."""
  found = dict(first)
  for path, reason in more.items():
    known = found.get(path)
    found[path] = reason if known is None or reason in known else f'{known}; {reason}'
  return found


def check_model(model: Any, variables: Any) -> None:
  """Raises ValueError unless `model` is a Linen module and `variables` are a mapping with `'params'`."""
  check_linen(model)
  if not isinstance(variables, Mapping) or 'params' not in variables:
    held = ', '.join(map(repr, variables)) if isinstance(variables, Mapping) else ''
    raise ValueError(
      f"variables are what `model.init` returns, {{'params': ...}}; got a {type(variables).__name__}"
      f'{f" of {held[:100]}" if held else ""}.'
    )


def check_quantized(value: Any, function: str) -> None:
  """Raises ValueError unless `value` is a `Quantized`."""
  if not isinstance(value, Quantized):
    raise ValueError(
      f'{function} takes a Quantized, which ptq, percentile_ptq, repq, gptq_ptq and lsq return; got '
      f'{type(value).__name__}.'
    )
