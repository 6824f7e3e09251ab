"""Causal attention of decoders: grouped-query heads, padding and a cache of keys and values.

Variables that hold a collection `'cache'` (of a decoder's `init_cache`) run the decoder incrementally: tokens
are appended to those that the cache holds. All blocks share one `Context`, which the decoder computes once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.attention import attention_scores, softmax, weighted_values
from jaxlab.models.intercept import HookPoint

Array = jax.Array
PyTree = Any


class Context(NamedTuple):
  """What a block must know of the sequences besides its input.

  Attributes:
    positions: int32 `[batch, time]`, the number of real tokens before each.
    mask: bool `[batch, time, keys]`, true where a query may look.
    key_positions: int32 `[batch, keys]`, likewise of the keys: the same without a cache.
    slot: int32, the cache's slot of the first token; None without a cache.
  """

  positions: Array
  mask: Array
  key_positions: Array
  slot: Array | None = None


def check_tokens(model: str, tokens: Array, max_length: int | None, mask: Array | None) -> None:
  """Raises ValueError unless tokens are integers `[batch, time]` that fit the model, and `mask` them."""
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f'{model} reads integer tokens [batch, time]; got {tokens.dtype} {tokens.shape}.'
    )
  if max_length is not None and tokens.shape[1] > max_length:
    raise ValueError(
      f'{model}: {tokens.shape[1]} tokens, but max_length={max_length} positions are stored; cut the '
      f'sequences.'
    )
  if mask is not None and mask.shape != tokens.shape:
    raise ValueError(f'{model}: mask {mask.shape} must have the shape of tokens, {tokens.shape}.')


def make_context(module: nn.Module, tokens: Array, mask: Array | None) -> Context | None:
  """Returns the context of `tokens` `[batch, time]` and advances the cache of `module`, if there is one.

  None, without cache and mask, stands for plain causal attention at positions 0, 1, ...

  Args:
    module: the bound decoder.
    tokens: int `[batch, time]`.
    mask: `[batch, time]`, false or 0 for padding: no real token looks there, and it takes no position.

  Raises:
    ValueError: if the cache does not fit the batch or is not mutable.
  """
  batch, time = tokens.shape
  if not module.has_variable('cache', 'slot'):
    if mask is None:
      return None
    mask = mask.astype(bool)
    causal = jnp.tril(jnp.ones((time, time), bool))
    positions = count_before(mask)
    return Context(positions, causal & mask[:, None, :], positions)
  if not module.is_mutable_collection('cache'):
    raise ValueError("The variables hold a cache: apply the model with mutable=['cache'].")
  slot, valid = module.get_variable('cache', 'slot'), module.get_variable('cache', 'mask')
  if valid.shape[0] != batch or time > valid.shape[1]:
    raise ValueError(
      f'tokens {tokens.shape} do not fit the cache of {valid.shape} (batch, length): make one by '
      f'init_cache(batch, length).'
    )
  mask = jnp.ones((batch, time), bool) if mask is None else mask.astype(bool)
  positions = count_before(mask) + jnp.sum(valid, axis=1, dtype=jnp.int32)[:, None]
  valid = jax.lax.dynamic_update_slice_in_dim(valid, mask, slot, axis=1)
  module.put_variable('cache', 'slot', slot + time)
  module.put_variable('cache', 'mask', valid)
  causal = jnp.arange(valid.shape[1]) <= slot + jnp.arange(time)[:, None]
  return Context(positions, causal & valid[:, None, :], count_before(valid), slot)


def positions_of(x: Array, context: Context | None) -> Array:
  """Returns the positions `[batch, time]` or `[1, time]` of `x` `[batch, time, ...]`."""
  return jnp.arange(x.shape[1])[None] if context is None else context.positions


def key_positions_of(x: Array, context: Context | None) -> Array:
  """Returns the positions `[batch, keys]` or `[1, keys]` of the keys that `x` `[batch, time, ...]` sees."""
  return jnp.arange(x.shape[1])[None] if context is None else context.key_positions


def attend(
  module: nn.Module,
  query: Array,
  key: Array,
  value: Array,
  context: Context | None = None,
  *,
  bias: Array | None = None,
  read_key: Callable[[Array], Array] | None = None,
) -> Array:
  """Returns causal attention, `softmax(mask(q k^T / sqrt(head width) + bias)) v`, heads merged.

  To be called in the compact `__call__` of `module`, to which it gives the hook points `query`, `key`,
  `value` `[batch, time, heads, head width]` (before scaling, and before keys and values enter the cache) and
  `softmax` `[batch, heads, queries, keys]`. The softmax is taken in at least float32. A query that may look
  nowhere (padding before the first token) gets finite values that mean nothing.

  Args:
    module: the bound attention module; its collection `'cache'`, if any, is read and updated.
    query: `[batch, time, heads, head width]`.
    key: `[batch, time, key-value heads, head width]`; the heads are a multiple of these, and query head h
      reads key-value head `h // (heads / key-value heads)`.
    value: as `key`, with a number of heads of its own.
    context: None: plain causal attention.
    bias: added to the scores, `[batch or 1, heads, queries or 1, keys]`; None: nothing.
    read_key: applied to all keys, those of the cache included, before they are multiplied; None: nothing.

  Returns:
    `[batch, time, heads * head width]`.

  Raises:
    ValueError: for keys or values of another shape than the cache has.
  """
  query = HookPoint(name='query')(query)
  key = HookPoint(name='key')(key)
  value = HookPoint(name='value')(value)
  time = query.shape[1]
  if context is None:
    mask = jnp.tril(jnp.ones((1, time, time), bool))
  else:
    mask = context.mask
    if context.slot is not None:
      key = _append(module, 'cached_key', key, context.slot)
      value = _append(module, 'cached_value', value, context.slot)
  scores = attention_scores(query, key if read_key is None else read_key(key))
  if bias is not None:
    scores = scores + bias.astype(scores.dtype)
  # Added, not selected: a CPU does it in one pass with the softmax. A score is lost beside the lowest number.
  scores = scores + jnp.where(mask, 0, jnp.finfo(scores.dtype).min).astype(scores.dtype)[:, None]
  weights = HookPoint(name='softmax')(softmax(scores).astype(value.dtype))
  return weighted_values(weights, value)


def empty_cache(
  attentions: Sequence[tuple[str, str]], shape: tuple[int, int, int, int], dtype: Any
) -> dict[str, PyTree]:
  """Returns a collection `'cache'` without tokens.

  Args:
    attentions: pairs (block, attention module in it).
    shape: `(batch, length, key-value heads, head width)` of each array of keys or values.
    dtype: of the keys and values; None: float32.
  """
  dtype = dtype or jnp.float32
  cache: dict[str, PyTree] = {
    block: {name: {k: jnp.zeros(shape, dtype) for k in ('cached_key', 'cached_value')}}
    for block, name in attentions
  }
  return {**cache, 'slot': jnp.zeros((), jnp.int32), 'mask': jnp.zeros(shape[:2], bool)}


def cache_bytes(cache: Mapping[str, PyTree]) -> int:
  """Returns the bytes of the keys and values that a cache (or its shapes) has room for."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache) if leaf.ndim == 4)


def count_before(mask: Array) -> Array:
  """Returns the number of real tokens before each, `[batch, time]`."""
  return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def _append(module: nn.Module, name: str, new: Array, slot: Array) -> Array:
  """Writes `new` `[batch, time, heads, width]` into the cache at `slot` and returns all of it."""
  old = module.get_variable('cache', name)
  if old.shape[2:] != new.shape[2:]:
    raise ValueError(
      f'{name}: the cache holds {old.shape[2]} heads of {old.shape[3]} channels, and {new.shape[2]} of '
      f'{new.shape[3]} are to be appended: are hooks missing that make them fewer?'
    )
  value = jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, axis=1)
  module.put_variable('cache', name, value)
  return value.astype(new.dtype)
