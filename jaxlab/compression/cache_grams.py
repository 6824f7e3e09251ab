"""What a decoder caches on calibration data: keys and values of each attention, and their Gram matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlab.compression.attention_layers import attention_layout, read_layers, require_groups
from jaxlab.compression.key_value_heads import group_gram
from jaxlab.models import Hook, any_of, capture
from jaxlab.trees import on_host

Array = jax.Array
PyTree = Any


class Caches(NamedTuple):
  """What one attention would cache, `[batch, time, kv_heads, head_width]`.

  Attributes:
    key: of rotary embedding behind the rotation.
    value: with its bias.
    unrotated_key: keys before the rotation; without one the same as `key`.
  """

  key: Array
  value: Array
  unrotated_key: Array


class Grams(NamedTuple):
  """The Gram matrices of `Caches`, float64 `[groups, n, n]`, n = group_size * head_width."""

  key: np.ndarray
  value: np.ndarray
  unrotated_key: np.ndarray


def collect_caches(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  tokens: Array,
  mask: Array | None = None,
  *,
  hooks: Sequence[Hook] = (),
) -> dict[str, Caches]:
  """Returns what each attention of a decoder would cache of `tokens`, by its path; to be jitted.

  Args:
    model: `Llama`, `Bloom` or `GPT2`.
    variables: of the model.
    tokens: integers `[batch, time]`.
    mask: `[batch, time]`, false or 0 for padding, whose entries mean nothing.
    hooks: around the model.

  Raises:
    ValueError: for another model.
  """
  layout = attention_layout(model)
  names = ['key', 'value', *([layout.unrotated_key] if layout.rotary else [])]
  wanted = [f'{path}/{name}' for path in layout.paths for name in names]
  _, found = capture(model, variables, [any_of(wanted)], tokens, mask=mask, hooks=hooks)

  def caches(path: str) -> Caches:
    key, value = found[f'{path}/key'], found[f'{path}/value']
    if not layout.rotary:
      return Caches(key, value, key)
    return Caches(key, value, found[f'{path}/{layout.unrotated_key}'].reshape(key.shape))

  return {path: caches(path) for path in layout.paths}


def batch_grams(caches: Mapping[str, Caches], group_size: int, mask: Array | None = None) -> PyTree:
  """Returns the Gram matrices of one batch of caches on the device, in float32, by path; to be jitted.

  What leaves the device are `n^2` numbers a group in place of the caches; sums over batches belong in float64
  (`cache_grams(on_device=True)`). Products are of the highest precision; directions of a cache below 1e-3 of
  its largest singular value, 1e-6 of its energy, are lost in them.

  Args:
    caches: of `collect_caches`.
    group_size: consecutive heads of a group.
    mask: `[batch, time]`, false or 0 for padding, which does not count.

  Returns:
    `Grams` of float32 arrays by path.
  """

  def gram(cache: Array) -> Array:
    batch, time, heads, width = cache.shape
    rows = cache.reshape(batch * time, heads // group_size, group_size * width)
    rows = rows.astype(jnp.float32)
    if mask is not None:
      # Selected, not multiplied: what padding holds may be no number.
      rows = jnp.where(mask.reshape(-1, 1, 1).astype(bool), rows, 0)
    return jnp.einsum('rgn,rgm->gnm', rows, rows, precision='highest')

  return {path: Grams(*map(gram, own)) for path, own in caches.items()}


def cache_grams(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Iterable[Array | tuple[Array, Array]],
  group_size: int,
  *,
  hooks: Sequence[Hook] = (),
  on_device: bool = False,
) -> dict[str, Grams]:
  """Returns the Gram matrices of a decoder's caches on calibration data, summed batch by batch.

  Caches come to the host a batch at a time, where they are multiplied in float64; no more than one batch of
  them is held. Nothing is centered and nothing left out but padding: the massive activations of first tokens
  belong to what is cached.

  Args:
    model: `Llama`, `Bloom` or `GPT2`.
    variables: of the model; they may be sharded.
    batches: of tokens `[batch, time]`, or pairs (tokens, mask), false or 0 for padding.
    group_size: consecutive heads of keys and values of a group. `subgroup_grams` makes those of its divisors.
    hooks: around the model.
    on_device: multiply each batch on the device, in float32 (`batch_grams`).

  Returns:
    `Grams` by the path of each attention.

  Raises:
    ValueError: for another model, a group size that does not divide, no batch, or fewer tokens than a head
      has channels.
  """
  layout = attention_layout(model)
  require_groups(layout, group_size)

  @jax.jit
  def collect(variables: PyTree, tokens: Array, mask: Array | None) -> PyTree:
    caches = collect_caches(model, variables, tokens, mask, hooks=hooks)
    return batch_grams(caches, group_size, mask) if on_device else caches

  total, count = None, 0
  for batch in batches:
    tokens, mask = batch if isinstance(batch, tuple) else (batch, None)
    held = None if mask is None else on_host(mask)
    found = on_host(collect(dict(variables), tokens, mask))
    if not on_device:
      found = {
        path: Grams(*(group_gram(cache, group_size, held) for cache in own))
        for path, own in found.items()
      }
    found = jax.tree.map(lambda gram: np.asarray(gram, np.float64), found)
    total = found if total is None else jax.tree.map(np.add, total, found)
    count += np.size(tokens) if held is None else int(np.sum(held.astype(bool)))
  if total is None:
    raise ValueError('batches: there is none to calibrate on.')
  if count < layout.head_width:
    raise ValueError(
      f'batches hold {count} tokens, fewer than the {layout.head_width} directions of a head.'
    )
  return total


def weight_grams(
  model: nn.Module, variables: Mapping[str, PyTree], group_size: int
) -> dict[str, Grams]:
  """Returns the Gram matrices of the kernels of keys and values: the basis by weights alone, SVD-w.

  Biases do not count.

  Args:
    model: `Llama`, `Bloom` or `GPT2`.
    variables: of the model.
    group_size: as of `cache_grams`.

  Returns:
    `Grams` by the path of each attention; keys are not rotated.

  Raises:
    ValueError: for another model, or a group size that does not divide.
  """
  layout = attention_layout(model)
  require_groups(layout, group_size)
  found = {}
  for path, layers in read_layers(layout, variables).items():
    key, value = (
      group_gram(own.kernel.reshape(-1, layout.num_kv_heads, layout.head_width), group_size)
      for own in (layers.key, layers.value)
    )
    found[path] = Grams(key, value, key)
  return found


def subgroup_grams(grams: Mapping[str, Grams], parts: int) -> dict[str, Grams]:
  """Returns the Gram matrices of groups that are `parts` times as small, which lie on the diagonal.

  Raises:
    ValueError: for a number of parts that does not divide.
  """

  def cut(gram: np.ndarray) -> np.ndarray:
    groups, size, _ = gram.shape
    if parts < 1 or size % parts:
      raise ValueError(f'parts={parts} do not divide groups of {size} channels.')
    blocks = gram.reshape(groups, parts, size // parts, parts, size // parts)
    return np.einsum('gpnpm->gpnm', blocks).reshape(-1, size // parts, size // parts)

  return {path: Grams(*map(cut, own)) for path, own in grams.items()}
