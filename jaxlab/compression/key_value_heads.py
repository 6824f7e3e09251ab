"""Fewer heads of keys and values: multi-head attention made grouped-query attention by low-rank caches.

"Effectively Compress KV Heads for LLM" (Yu et al. 2024, https://arxiv.org/abs/2406.07056). Consecutive heads
of keys or values form groups of `group_size`. Their caches, side by side, are cut to the directions of one
head's width that keep most of them on calibration data, and the projections are folded into the layers before
and behind, so that what is left is ordinary grouped-query attention:

  gram = sum(group_gram(value, group_size) for value in calibration)
  value, output = fold_values(value_kernel, output_kernel, group_basis(gram, head_width), head_width)

Values can always be folded; queries and keys if no rotation stands between their layers and the scores (no
position terms, learned positions, ALiBi). For rotary embedding see `jaxlab.compression.rotary_keys`, for
whole networks `jaxlab.compression.grouped_heads`. Host code in NumPy; bases are computed in float64, where
float32 would lose the tail of large activations.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike


class FoldedLayers(NamedTuple):
  """Two layers that share a basis.

  Attributes:
    cached: kernel `[dim, groups * head_width]` of the layer that makes what is cached.
    partner: kernel of the layer that is folded with it: the output's or the queries', of unchanged shape.
    cached_bias: `[groups * head_width]`, or None.
    partner_bias: of the queries `[heads * head_width]`, or None; an output's bias stays as it is.
  """

  cached: np.ndarray
  partner: np.ndarray
  cached_bias: np.ndarray | None = None
  partner_bias: np.ndarray | None = None


def group_gram(cache: ArrayLike, group_size: int, mask: ArrayLike | None = None) -> np.ndarray:
  """Returns the Gram matrices `C_G^T C_G` of the heads of each group, side by side, not centered.

  Those of several batches add up. The Gram matrices of a layer's kernel `[dim, heads, head_width]` in place
  of a cache give the basis by weights alone, the baseline SVD-w.

  Args:
    cache: keys or values `[..., kv_heads, head_width]`, with their biases.
    group_size: consecutive heads of a group, a divisor of their number.
    mask: `[...]`, false or 0 for padding, which does not count; None: everything counts.

  Returns:
    float64 `[groups, group_size * head_width, group_size * head_width]`.

  Raises:
    ValueError: for a cache without heads, values that are not finite, a group size that does not divide, or a
      mask of another shape.

  References:
    Yu et al. 2024 (https://arxiv.org/abs/2406.07056), SVD-a and SVD-w.

  >>> group_gram(np.array([[[1.0], [2.0]], [[0.0], [1.0]]]), 2).tolist()
  [[[1.0, 2.0], [2.0, 5.0]]]
  """
  cache = np.asarray(cache).astype(np.float64)
  if cache.ndim < 3 or 0 in cache.shape:
    raise ValueError(f'cache must be [..., kv_heads, head_width] and not empty, got {cache.shape}.')
  heads, width = cache.shape[-2:]
  if group_size < 1 or heads % group_size:
    raise ValueError(f'group_size={group_size} does not divide the {heads} heads of the cache.')
  rows = cache.reshape(-1, heads // group_size, group_size * width)
  if mask is not None:
    mask = np.asarray(mask, bool)
    if mask.shape != cache.shape[:-2]:
      raise ValueError(f'mask must be {cache.shape[:-2]}, as the cache, got {mask.shape}.')
    rows = rows[mask.ravel()]
  if not np.all(np.isfinite(rows)):
    raise ValueError('cache has values that are not finite.')
  rows = rows.swapaxes(0, 1)
  return rows.swapaxes(1, 2) @ rows


def group_basis(gram: ArrayLike, head_width: int) -> np.ndarray:
  """Returns the orthonormal directions of each group that keep most of its cache.

  The first `head_width` right singular vectors of the cache `C_G`, by falling singular value: of all
  projections of that rank, `C_G Psi Psi^T` is nearest to `C_G` (Eckart & Young). The largest entry of each is
  positive.

  Args:
    gram: `[groups, n, n]`, of `group_gram`.
    head_width: directions of a group.

  Returns:
    float64 `[groups, n, head_width]`.

  Raises:
    ValueError: for Gram matrices of another shape or not finite, or a width that is not in 1 to n.

  Warns:
    UserWarning: if a group's cache has fewer directions than asked for: calibrate on more tokens.

  References:
    Yu et al. 2024 (https://arxiv.org/abs/2406.07056), SVD-a.

  >>> group_basis(np.diag([1.0, 9.0, 4.0])[None], 2).astype(int).tolist()
  [[[0, 0], [1, 0], [0, 1]]]
  """
  values, vectors = _eigen(gram)
  size = values.shape[1]
  if not 1 <= head_width <= size:
    raise ValueError(f'head_width={head_width}: expected 1 to {size}, the width of a group.')
  ranks = np.sum(values > values[:, :1] * size * np.finfo(np.float64).eps, axis=1)
  if ranks.min() < head_width:
    warnings.warn(
      f'a group of calibration caches has rank {ranks.min()} and is asked for {head_width} directions: '
      'calibrate on more tokens.',
      stacklevel=2,
    )
  basis = vectors[..., :head_width]
  largest = np.take_along_axis(basis, np.abs(basis).argmax(1)[:, None], axis=1)
  return basis * np.where(largest < 0, -1.0, 1.0)


def energy_shares(gram: ArrayLike) -> np.ndarray:
  """Returns the share of each group's energy in its first k directions, `sum_{i<=k} s_i^2 / sum_i s_i^2`.

  Args:
    gram: `[groups, n, n]`, of `group_gram`.

  Returns:
    float64 `[groups, n]`, k = 1 to n; NaN for a group of zeros.

  Raises:
    ValueError: for Gram matrices of another shape or not finite.

  References:
    Yu et al. 2024 (https://arxiv.org/abs/2406.07056), the low rank of caches.

  >>> energy_shares(np.diag([1.0, 3.0])[None]).tolist()
  [[0.75, 1.0]]
  """
  energies = np.cumsum(_eigen(gram)[0], axis=1)
  with np.errstate(invalid='ignore'):
    return energies / energies[:, -1:]


def fold_values(
  value_kernel: ArrayLike,
  output_kernel: ArrayLike,
  basis: ArrayLike,
  head_width: int,
  *,
  value_bias: ArrayLike | None = None,
) -> FoldedLayers:
  """Returns the layers of values and output with one head of values a group.

  With W_V of the group's heads side by side and the rows Psi_j of head j in the basis Psi:

    W_V' = W_V Psi,    b_V' = b_V Psi,    W_O'^j = Psi_j^T W_O^j  of every query head that reads head j

  Values are never rotated: this holds with any position embedding.

  Args:
    value_kernel: `[dim, kv_heads * head_width]`, used as `x @ kernel`.
    output_kernel: `[heads * head_width, dim]`; query head h reads values `h // (heads / kv_heads)`.
    basis: `[groups, group_size * head_width, head_width]`, of `group_basis`.
    head_width: of the network, which a group keeps.
    value_bias: `[kv_heads * head_width]`, or None.

  Returns:
    `FoldedLayers` of the kernels' dtypes, `partner` the output's; attention is to use `groups` heads of keys
    and values.

  Raises:
    ValueError: if shapes do not fit each other, or the basis has another number of directions.

  References:
    Yu et al. 2024 (https://arxiv.org/abs/2406.07056), SVD-a for values.

  >>> basis = np.array([[[1.0], [0.0]]])
  >>> folded = fold_values(np.array([[2.0, 3.0]]), np.array([[5.0], [7.0]]), basis, 1)
  >>> folded.cached.tolist(), folded.partner.tolist()
  ([[2.0]], [[5.0], [0.0]])
  """
  _require_directions(basis, head_width)
  output_kernel = np.asarray(output_kernel)
  cached = _narrow('value_kernel', value_kernel, basis)
  partner = _turn('output_kernel', output_kernel.T, value_kernel, basis).T
  bias = _bias('value_bias', value_bias, value_kernel)
  return FoldedLayers(cached, partner, None if bias is None else _narrow('value_bias', bias, basis))


def fold_keys(
  query_kernel: ArrayLike,
  key_kernel: ArrayLike,
  basis: ArrayLike,
  head_width: int,
  *,
  query_bias: ArrayLike | None = None,
  key_bias: ArrayLike | None = None,
) -> FoldedLayers:
  """Returns the layers of queries and keys with one head of keys a group, without rotation between.

  With W_K of the group's heads side by side and the rows Phi_j of head j in the basis Phi:

    W_K' = W_K Phi,    W_Q'^j = W_Q^j Phi_j  of every query head that reads head j,    biases likewise

  The scale of scores stays that of the head's width, and ALiBi's slopes those of the query heads. Rotary
  embedding commutes with a `commuting_basis`, and with no other: folded with one, such a network is wrong.

  Args:
    query_kernel: `[dim, heads * head_width]`; query head h reads keys `h // (heads / kv_heads)`.
    key_kernel: `[dim, kv_heads * head_width]`, used as `x @ kernel`.
    basis: `[groups, group_size * head_width, head_width]`, of `group_basis`.
    head_width: of the network, which a group keeps.
    query_bias: `[heads * head_width]`, or None.
    key_bias: `[kv_heads * head_width]`, or None.

  Returns:
    `FoldedLayers` of the kernels' dtypes, `partner` the queries'.

  Raises:
    ValueError: if shapes do not fit each other, or the basis has another number of directions.

  References:
    Yu et al. 2024 (https://arxiv.org/abs/2406.07056), SVD-a for keys of networks such as BLOOM.

  >>> basis = np.array([[[1.0], [0.0]]])
  >>> folded = fold_keys(np.array([[5.0, 7.0]]), np.array([[2.0, 3.0]]), basis, 1)
  >>> folded.cached.tolist(), folded.partner.tolist()
  ([[2.0]], [[5.0, 0.0]])
  """
  _require_directions(basis, head_width)
  query = _bias('query_bias', query_bias, query_kernel)
  key = _bias('key_bias', key_bias, key_kernel)
  return FoldedLayers(
    _narrow('key_kernel', key_kernel, basis),
    _turn('query_kernel', query_kernel, key_kernel, basis),
    None if key is None else _narrow('key_bias', key, basis),
    None if query is None else _turn('query_bias', query, key_kernel, basis),
  )


def mean_pool_heads(kernel: ArrayLike, head_width: int, group_size: int) -> np.ndarray:
  """Returns a layer of keys or values with the mean of each group's heads: the baseline without a basis.

  Args:
    kernel: `[dim, kv_heads * head_width]`, or a bias without the first axis.
    head_width: channels of a head.
    group_size: consecutive heads of a group, a divisor of their number.

  Returns:
    `[dim, kv_heads / group_size * head_width]`, of the kernel's dtype; queries and output stay as they are.

  Raises:
    ValueError: if widths do not divide.

  References:
    Ainslie et al., GQA, EMNLP 2023 (https://arxiv.org/abs/2305.13245).

  >>> mean_pool_heads(np.array([1.0, 2.0, 3.0, 6.0]), head_width=2, group_size=2).tolist()
  [2.0, 4.0]
  """
  kernel = np.asarray(kernel)
  if min(head_width, group_size) < 1 or kernel.shape[-1] % (head_width * group_size):
    raise ValueError(
      f'kernel of shape {kernel.shape}: its last axis does not divide into groups of {group_size} heads of '
      f'{head_width} channels.'
    )
  heads = kernel.reshape(*kernel.shape[:-1], -1, group_size, head_width).astype(np.float64)
  pooled = heads.mean(axis=-2)
  return pooled.reshape(*kernel.shape[:-1], -1).astype(kernel.dtype)


def _eigen(gram: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Returns eigenvalues, falling and not negative, and eigenvectors in columns."""
  values, vectors = np.linalg.eigh(checked_gram(gram))
  return np.maximum(values[:, ::-1], 0), vectors[..., ::-1]


def checked_gram(gram: ArrayLike) -> np.ndarray:
  """Returns Gram matrices in float64; raises ValueError unless they are `[groups, n, n]` and finite."""
  gram = np.asarray(gram).astype(np.float64)
  if gram.ndim != 3 or gram.shape[1] != gram.shape[2] or 0 in gram.shape:
    raise ValueError(f'gram must be [groups, n, n] and not empty, got {gram.shape}.')
  if not np.all(np.isfinite(gram)):
    raise ValueError('gram has values that are not finite.')
  return gram


def _narrow(name: str, kernel: ArrayLike, basis: ArrayLike) -> np.ndarray:
  """Returns `[..., groups * n] -> [..., groups * width]`, each group times its basis."""
  kernel, basis = np.asarray(kernel), _basis(basis)
  groups, size, _ = basis.shape
  if kernel.ndim < 1 or kernel.shape[-1] != groups * size:
    raise ValueError(
      f'{name} must have {groups * size} channels of heads, {groups} groups of {size} as the basis; got '
      f'{kernel.shape}.'
    )
  split = kernel.reshape(*kernel.shape[:-1], groups, size).astype(np.float64)
  folded = np.einsum('...gn,gnk->...gk', split, basis)
  return folded.reshape(*kernel.shape[:-1], -1).astype(kernel.dtype)


def _turn(name: str, kernel: ArrayLike, kv_kernel: ArrayLike, basis: ArrayLike) -> np.ndarray:
  """Returns `[..., heads * width]`, each query head times the basis' rows of the head that it reads."""
  kernel, basis = np.asarray(kernel), _basis(basis)
  width = basis.shape[-1]
  kv_heads = np.shape(kv_kernel)[-1] // width
  if kernel.ndim < 1 or not kernel.shape[-1] or kernel.shape[-1] % (kv_heads * width):
    raise ValueError(
      f'{name} must have a multiple of {kv_heads} heads of {width} channels, those of the basis; got '
      f'{kernel.shape[-1:]} channels of heads.'
    )
  heads = kernel.shape[-1] // width
  rows = np.repeat(basis.reshape(kv_heads, width, width), heads // kv_heads, axis=0)
  split = kernel.reshape(*kernel.shape[:-1], heads, width).astype(np.float64)
  folded = np.einsum('...hn,hnk->...hk', split, rows)
  return folded.reshape(kernel.shape).astype(kernel.dtype)


def _require_directions(basis: ArrayLike, head_width: int) -> None:
  """Raises ValueError unless a group keeps as many directions as a head has channels."""
  if (found := _basis(basis).shape[-1]) != head_width:
    raise ValueError(f'basis has {found} directions a group, a head {head_width} channels.')


def _basis(basis: ArrayLike) -> np.ndarray:
  basis = np.asarray(basis).astype(np.float64)
  if basis.ndim != 3 or 0 in basis.shape or basis.shape[1] % basis.shape[2]:
    raise ValueError(
      f'basis must be [groups, group_size * head_width, head_width], got {basis.shape}.'
    )
  return basis


def _bias(name: str, bias: ArrayLike | None, kernel: ArrayLike) -> np.ndarray | None:
  if bias is not None and np.shape(bias) != np.shape(kernel)[-1:]:
    raise ValueError(
      f'{name} must be {np.shape(kernel)[-1:]}, as its kernel; got {np.shape(bias)}.'
    )
  return None if bias is None else np.asarray(bias)
