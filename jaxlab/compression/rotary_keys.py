"""Fewer heads of keys under rotary embedding, which stands between their layer and the scores.

A general basis cannot be folded into the layers there: `rotation(x W) Phi` is no `rotation(x W')`. Three
ways remain. Under `projection_hooks` all heads are rotated, then projected and cached; under
`expansion_hooks` a projection of what is not rotated is cached, and expanded and rotated at every step; a
`commuting_basis` commutes with rotations, and folds.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlab.compression.key_value_heads import checked_gram
from jaxlab.models.intercept import Hook, Site

Array = jax.Array


def commuting_basis(gram: ArrayLike, head_width: int) -> np.ndarray:
  """Returns the directions of each group that mix heads by one complex number a frequency and head.

  Channels p and p + head_width / 2 of head j are the complex number x_jp, which rotary embedding multiplies
  by a phase that all heads share. With v the first right singular vector of the group's heads at a frequency
  (`[tokens, group_size]`), c_p = sum_j x_jp v_j is cached in place of x_jp ~ c_p conj(v_j), and queries
  become q_jp v_j. These products commute with rotations: with this basis `fold_keys` is right under rotary
  embedding, too. The gram may be that of rotated keys or of keys before rotation, which have the same v.

  This is no part of the paper, but a reference beside it: a basis within a class that folds, and hence with a
  larger error than one of `group_basis`.

  Args:
    gram: `[groups, n, n]`, n = group_size * head_width, of `group_gram`.
    head_width: of the network, even.

  Returns:
    float64 `[groups, n, head_width]`, orthonormal. Of each v the largest entry is real and positive.

  Raises:
    ValueError: for Gram matrices of another shape or not finite, or a width that is odd or no divisor of n.

  >>> keys = np.array(
  ...   [[1.0, 0.0, 0.0, 2.0], [0.0, 3.0, -6.0, 0.0]]
  ... )  # two heads, the second 2i the first
  >>> basis = commuting_basis((keys.T @ keys)[None], 2)
  >>> bool(np.allclose(keys @ basis[0] @ basis[0].T, keys))
  True
  """
  gram = checked_gram(gram)
  groups, size, _ = gram.shape
  if head_width < 2 or head_width % 2 or size % head_width:
    raise ValueError(
      f'head_width={head_width}: expected an even divisor of {size}, the width of a group.'
    )
  heads, half = size // head_width, head_width // 2
  parts = gram.reshape(groups, heads, 2, half, heads, 2, half)
  # Of the matrix between real and imaginary parts what one frequency has with itself.
  parts = np.einsum('gjapkbp->gpajbk', parts)
  real = parts[:, :, 0, :, 0] + parts[:, :, 1, :, 1]
  imaginary = parts[:, :, 0, :, 1] - parts[:, :, 1, :, 0]
  vectors = np.linalg.eigh(real + 1j * imaginary)[1][..., -1]
  largest = np.take_along_axis(vectors, np.abs(vectors).argmax(-1)[..., None], axis=-1)
  vectors = (vectors * np.conj(largest) / np.abs(largest)).swapaxes(1, 2)
  basis = np.zeros((groups, heads, 2, half, 2, half))
  frequency = np.arange(half)
  basis[:, :, 0, frequency, 0, frequency] = basis[:, :, 1, frequency, 1, frequency] = vectors.real
  basis[:, :, 0, frequency, 1, frequency] = vectors.imag
  basis[:, :, 1, frequency, 0, frequency] = -vectors.imag
  return basis.reshape(groups, size, head_width)


def query_rows(basis: ArrayLike, num_heads: int) -> np.ndarray:
  """Returns what each query head is multiplied by: the rows of its key head in the basis of its group.

  Args:
    basis: `[groups, group_size * head_width, head_width]`.
    num_heads: of queries.

  Returns:
    `[num_heads, head_width, head_width]`.

  Raises:
    ValueError: if query heads do not divide over key heads.
  """
  basis = np.asarray(basis)
  width = basis.shape[-1]
  rows = basis.reshape(-1, width, width)
  if num_heads % len(rows):
    raise ValueError(f'num_heads={num_heads} is not a multiple of the {len(rows)} heads of keys.')
  return np.repeat(rows, num_heads // len(rows), axis=0)


def projection_arrays(basis: ArrayLike, num_heads: int) -> dict[str, Any]:
  """Returns what `projection_hooks` read at one attention module: a subtree of the collection `'hooks'`."""
  basis = np.asarray(basis)
  return {'key': {'basis': basis}, 'query': {'basis': query_rows(basis, num_heads)}}


def projection_hooks() -> tuple[Hook, ...]:
  """Returns hooks under which rotated keys and queries are projected, `R k Phi` and `R q_j Phi_j`.

  What is cached is the projection, one head a group. To a token's work are added `group_size head_width^2`
  products a group for its key, and `head_width^2` a query head.
  """
  return _PROJECTION


def expansion_arrays(basis: ArrayLike) -> dict[str, Any]:
  """Returns what `expansion_hooks` read at one attention module: a subtree of the collection `'hooks'`."""
  return {'key_read': {'basis': np.asarray(basis)}}


def expansion_hooks() -> tuple[Hook, ...]:
  """Returns hooks under which keys that are read are expanded to the heads of their group, `c Phi^T`.

  For attention that caches keys before they are rotated (`Llama(cache_rotated=False)`).
  """
  return _EXPANSION


def _project_keys(site: Site, key: Array) -> Array:
  basis = site.read('basis').astype(key.dtype)
  groups, size, _ = basis.shape
  heads = key.reshape(*key.shape[:2], groups, size)
  return jnp.einsum('btgn,gnk->btgk', heads, basis)


def _turn_queries(site: Site, query: Array) -> Array:
  return jnp.einsum('bthn,hnk->bthk', query, site.read('basis').astype(query.dtype))


def _expand_keys(site: Site, key: Array) -> Array:
  basis = site.read('basis').astype(key.dtype)
  heads = jnp.einsum('btgk,gnk->btgn', key, basis)
  return heads.reshape(*key.shape[:2], -1, key.shape[-1])


# The same objects each time, which find compiled programs again.
_PROJECTION = (
  Hook(r'(.*/)?self_attn/key', output=_project_keys),
  Hook(r'(.*/)?self_attn/query', output=_turn_queries),
)
_EXPANSION = (Hook(r'(.*/)?self_attn/key_read', output=_expand_keys),)
