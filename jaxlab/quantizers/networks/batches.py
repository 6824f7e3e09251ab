"""Calibration batches: what a model is called with, and which of its positions count.

A batch is what stands between the parentheses of the model's call: an array is its only argument, a tuple
several, a mapping keywords; what is no array (flags, names, None) is static. Whatever is the same for all
batches may be given once, as keywords of the method.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlab.models.blockwise import Skeleton
from jaxlab.models.intercept import Hook, apply
from jaxlab.models.main_arrays import array_leaves, is_array
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any
Batch = Array | tuple | Mapping[str, Any]
Batches = Batch | Iterable[Batch]
Call = tuple[tuple, dict[str, Any]]
Counted = str | Callable[..., Array] | None


def peek(batches: Batches) -> tuple[Batch, Iterator[Batch]]:
  """Returns the first batch and all batches of `batches`, one array or mapping, or an iterable read once.

  Raises:
    ValueError: if there is none.
  """
  single = is_array(batches) or isinstance(batches, Mapping)
  rest = iter([batches] if single else batches)
  for first in rest:
    return first, itertools.chain([first], rest)
  raise ValueError('batches is empty: calibration needs at least one batch of model inputs.')


def as_call(batch: Batch, kwargs: Mapping[str, Any]) -> Call:
  """Returns `(args, kwargs)` of the model's call for a batch, next to what is the same for all of them.

  Raises:
    ValueError: for `mutable`: a model is calibrated as it is used, its collections being read.

  >>> as_call((1, 2), {'train': False}), as_call({'x': 1}, {})
  (((1, 2), {'train': False}), ((), {'x': 1}))
  """
  if 'mutable' in kwargs:
    raise ValueError(
      f'mutable={kwargs["mutable"]!r}: what a model writes while it is calibrated goes nowhere. Call it such '
      f'that it reads its collections alone (train=False, no decoding).'
    )
  if isinstance(batch, Mapping):
    return (), {**kwargs, **batch}
  return (batch if isinstance(batch, tuple) else (batch,)), dict(kwargs)


def joined_batch(batches: Batches) -> Batch:
  """Returns all batches as one, arrays along their first axis.

  Raises:
    ValueError: if there is none, or batches are not called alike: in other arguments, or other flags.
  """
  found = list(peek(batches)[1])
  if len(found) == 1:
    return found[0]
  skeletons = [Skeleton.of(batch) for batch in found]
  first = skeletons[0]
  for index, own in enumerate(skeletons):
    if (own.tree, own.static) != (first.tree, first.static):
      raise ValueError(
        f'Batches are arguments of one call of the model, arrays alone differ; batch {index} holds '
        f'{own.tree} with {own.static}, the first one {first.tree} with {first.static}.'
      )
  joined = []
  for arrays in zip(*map(array_leaves, found)):
    host = all(isinstance(array, np.ndarray) for array in arrays)
    if arrays[0].ndim == 0:
      raise ValueError(
        'A batch holds a number as an array: give what is the same for all batches as a keyword.'
      )
    joined.append((np if host else jnp).concatenate(arrays))
  return first.fill(joined)


def jitted_calls(
  step: Callable[..., PyTree],
  model: nn.Module,
  batches: Batches,
  kwargs: Mapping[str, Any],
  counted: Counted = None,
  where: Callable[[Array | None], Any] = lambda mask: mask,
) -> Iterator[Callable[..., PyTree]]:
  """Yields for every batch the function of `values` that returns `step(call, where(mask), *values)`.

  It is jitted, once for batches that are called alike, in the same arguments and flags.

  Args:
    step: see above.
    model: which is called.
    batches: see above.
    kwargs: what is the same for all of them.
    counted: which positions of a batch count.
    where: of the mask, outside of `jit`, e.g. `positions_of`.

  Raises:
    ValueError: see `peek`, `as_call` and `counted_mask`.
  """

  def jitted(skeleton: Skeleton) -> Callable[..., PyTree]:
    return jax.jit(lambda leaves, mask, *values: step(skeleton.fill(leaves), mask, *values))

  runs: dict[str, Callable[..., PyTree]] = {}
  for batch in peek(batches)[1]:
    call = as_call(batch, kwargs)
    skeleton, mask = Skeleton.of(call), where(counted_mask(counted, model, call))
    # Flags may be unhashable; another shape is compiled anew by the same function.
    kind = str((skeleton.tree, skeleton.static))
    if kind not in runs:
      runs[kind] = jitted(skeleton)
    yield functools.partial(runs[kind], array_leaves(call), mask)


def trace_calls(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  call: Call,
  visit: Callable[..., Any],
  pattern: str = '.*',
  methods: tuple[str, ...] = ('__call__',),
) -> None:
  """Runs the model abstractly, without memory or computation, with `visit` around its modules' calls.

  Args:
    model: any Linen module.
    variables: its variables, or their shapes.
    call: its arguments, arrays or shapes.
    visit: `(site, call, *args, **kwargs) -> y`, as of `Hook`.
    pattern: of the modules.
    methods: of the modules.
  """
  skeleton, hook = Skeleton.of(call), Hook(pattern, call=visit, methods=methods)

  def run(variables, leaves):
    args, kwargs = skeleton.fill(leaves)
    return apply(model, variables, *args, hooks=[hook], **kwargs)

  jax.eval_shape(run, dict(variables), array_leaves(call))


class Positions(NamedTuple):
  """The positions of a batch that count.

  Attributes:
    mask: `[batch, ...]`, bool.
    index: of those that count, among all, int32 `[counted]`.
    examples: that have one, int32.
  """

  mask: Array
  index: Array
  examples: Array


def counted_mask(counted: Counted, model: nn.Module, call: Call) -> np.ndarray | Array | None:
  """Returns which positions of a batch count, bool `[batch, ...]`, or None: all.

  Args:
    counted: the name of the model's argument that says it; or a function of the model's arguments.
    model: the module.
    call: its arguments.

  Raises:
    ValueError: if there is no such argument, it is no mask, or nothing counts.
  """
  if counted is None:
    return None
  args, kwargs = call
  if callable(counted):
    mask = counted(*args, **kwargs)
  else:
    names = list(inspect.signature(type(model).__call__).parameters)[1:]
    given = {**dict(zip(names, args)), **kwargs}
    if counted not in given:
      raise ValueError(
        f'counted={counted!r} is none of the arguments that the batch gives to {type(model).__name__}: '
        f'{", ".join(given)}.'
      )
    mask = given[counted]
  if not is_array(mask) or not mask.ndim or mask.dtype.kind not in 'biu':
    shown = f'{mask.dtype}{list(mask.shape)}' if is_array(mask) else type(mask).__name__
    raise ValueError(f'counted says which positions count, a bool [batch, ...]; got {shown}.')
  mask = mask != 0
  if is_concrete(mask) and not np.any(mask):
    raise ValueError('counted leaves no position of a batch: there is nothing to calibrate on.')
  return mask


def positions_of(mask: Array | None) -> Positions | None:
  """Returns the places of a mask; None for None.

  Raises:
    ValueError: for a traced mask: how many positions there are decides shapes.
  """
  if mask is None:
    return None
  if not is_concrete(mask):
    raise ValueError('counted needs batches that are not traced: call the method outside of jit.')
  mask = np.asarray(mask)
  index, examples = np.flatnonzero(mask), np.flatnonzero(mask.reshape(len(mask), -1).any(1))
  return Positions(mask, index.astype(np.int32), examples.astype(np.int32))


def _alignment(shape: Sequence[int], mask: Sequence[int], path: str, last: int) -> str:
  """Returns what the first axes of a value are: `'positions'`, the same in one axis, or `'examples'`.

  Args:
    shape: of the value.
    mask: shape of the mask.
    path: of the module, for the message.
    last: number of axes that are no positions for certain, its features.
  """
  shape, mask = tuple(shape), tuple(mask)
  if len(shape) >= len(mask) + last and shape[: len(mask)] == mask:
    return 'positions'
  if len(mask) > 1 and len(shape) == 1 + last and shape[0] == np.prod(mask):
    return 'flat'
  if shape[:1] == mask[:1] and (len(mask) == 1 or len(shape) <= 1 + last):
    return 'examples'
  raise ValueError(
    f'{path!r}: counted says which of {list(mask)} positions count, which does not tell which of '
    f'{list(shape)} do. Leave the module out of the rules, or counted out.'
  )


def counted_rows(x: Array, positions: Positions | None, path: str, softmax: bool = False) -> Array:
  """Returns the rows of `x` that count, `[rows, ...]`; all of `x`, as it is, without positions.

  A value `[batch, positions, ...]`, or one with both in one axis, is taken by positions, one of
  `[batch, features]` by examples.

  Args:
    x: value at a module.
    positions: of the batch.
    path: of the module.
    softmax: whether `x` is `[batch, heads, queries, keys]`: queries count.

  Raises:
    ValueError: if the shapes do not tell which rows count.
  """
  if positions is None:
    return x
  x = jnp.moveaxis(x, -2, 1) if softmax and x.ndim == 4 else x
  how = _alignment(x.shape, positions.mask.shape, path, 1)
  if how == 'positions':
    x = x.reshape(-1, *x.shape[positions.mask.ndim :])
  return x[positions.examples if how == 'examples' else positions.index]


def row_weights(x: Array, mask: Array | None, path: str) -> Array | None:
  """Returns 1 for rows of `x` that count, 0 for others, over the first axes of `x`, float32; None for None.

  Raises:
    ValueError: if the shapes do not tell.
  """
  if mask is None:
    return None
  how = _alignment(x.shape, mask.shape, path, 1)
  mask = jnp.asarray(mask)
  if how == 'examples':
    mask = mask.reshape(len(mask), -1).any(1)
  return (mask.reshape(-1) if how == 'flat' else mask).astype(jnp.float32)


def only_counted(x: Array, mask: Array | None, path: str) -> Array:
  """Returns `x` with a counted row in place of those that do not count.

  Its smallest and largest values are those of the rows that count.
  """
  weights = row_weights(x, mask, path)
  if weights is None:
    return x
  rows = x.reshape(-1, *x.shape[weights.ndim :])
  own = weights.reshape(-1) > 0
  new = jnp.where(own.reshape(-1, *(1,) * (rows.ndim - 1)), rows, rows[jnp.argmax(own)])
  return new.reshape(x.shape)
