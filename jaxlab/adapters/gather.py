"""What a frozen network sends to a device that adapts it: the tokens of all its layers as one tensor.

MIST (Tang et al., CVPR 2025, arXiv 2406.17559). Features are `z_0`, the tokens before the first block, to
`z_N`, those behind the last; see `collect_features`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlab.adapters.low_rank_modules import require_same_shape

Array = jax.Array


def gather_sum(
  features: Sequence[ArrayLike], indices: Sequence[int] | None = None, *, dtype: Any = None
) -> Array:
  """Returns the sum of layers' tokens, `z_{i_1} + z_{i_2} + ...`: as large as those of one layer.

  The sum is taken in at least float32 and cast behind it. The class token stays in it.

  Args:
    features: `z_0` ... `z_N`, `[batch, tokens, width]`.
    indices: of the layers; None: all. Two readings of the paper's k: `leading_layers`, `spaced_layers`.
    dtype: of what is returned: 'float16' halves the transfer; None: that of the features.

  Raises:
    ValueError: for indices that are none, out of range or repeated, and features of several shapes.

  >>> gather_sum([jnp.ones((1, 2, 3)), 2 * jnp.ones((1, 2, 3))])[0, 0].tolist()
  [3.0, 3.0, 3.0]
  """
  features = [jnp.asarray(z) for z in features]
  require_same_shape(features)
  chosen = tuple(range(len(features)) if indices is None else indices)
  out = [i for i in chosen if not 0 <= i < len(features)]
  if not chosen or out or len(set(chosen)) < len(chosen):
    raise ValueError(
      f'indices={chosen}: expected different ones of 0..{len(features) - 1}, at least one.'
    )
  wide = jnp.promote_types(jnp.result_type(*features), jnp.float32)
  total = features[chosen[0]].astype(wide)
  for i in chosen[1:]:
    total = total + features[i].astype(wide)
  return total.astype(jnp.result_type(*features) if dtype is None else dtype)


def gather_last(features: Sequence[ArrayLike], *, dtype: Any = None) -> Array:
  """Returns the last layer's tokens alone: the baseline of the sum."""
  return gather_sum(features, (len(features) - 1,), dtype=dtype)


def gather_concat(features: Sequence[ArrayLike], *, dtype: Any = None) -> Array:
  """Returns all layers' tokens next to one another, `[batch, tokens, (N + 1) width]`.

  What methods need that read every layer: N + 1 times the transfer. `split_layers` undoes it.
  """
  features = [jnp.asarray(z) for z in features]
  require_same_shape(features)
  joined = jnp.concatenate(features, -1)
  return joined if dtype is None else joined.astype(dtype)


def split_layers(joined: ArrayLike, count: int) -> tuple[Array, ...]:
  """Returns the `count` layers of `gather_concat`; raises ValueError if the width does not divide."""
  joined = jnp.asarray(joined)
  if count < 1 or joined.shape[-1] % count:
    raise ValueError(f'a width of {joined.shape[-1]} does not divide into {count} layers.')
  return tuple(jnp.split(joined, count, -1))


def leading_layers(k: int, depth: int) -> tuple[int, ...]:
  """Returns the layers 0 to k: the paper's formula `Sum(z_0, ..., z_k)`, read to the letter.

  All of them, k = depth, is the default of experiments (inferred).

  Raises:
    ValueError: for a k outside of 0..depth.

  >>> leading_layers(2, 12)
  (0, 1, 2)
  """
  if not 0 <= k <= depth:
    raise ValueError(f'k={k}: expected 0 to {depth}, the number of blocks.')
  return tuple(range(k + 1))


def spaced_layers(k: int, depth: int) -> tuple[int, ...]:
  """Returns k layers at equal gaps, 0, g, 2g, ... to the last: the other reading (inferred).

  Raises:
    ValueError: unless k is at least 2 and k - 1 divides the number of blocks.

  >>> spaced_layers(4, 12)
  (0, 4, 8, 12)
  """
  if not 2 <= k <= depth + 1 or depth % (k - 1):
    raise ValueError(f'k={k}: expected at least 2, with k - 1 a divisor of the {depth} blocks.')
  return tuple(range(0, depth + 1, depth // (k - 1)))


def transfer_bytes(shape: Sequence[int], dtype: Any = 'float32', num_tensors: int = 1) -> int:
  """Returns the bytes of `num_tensors` arrays: of an image's features, `shape` is `(tokens, width)`.

  Raises:
    ValueError: for negative sizes.

  >>> transfer_bytes((197, 768)), transfer_bytes((197, 768), 'float16')
  (605184, 302592)
  """
  if num_tensors < 0 or any(size < 0 for size in shape):
    raise ValueError(
      f'shape={tuple(shape)}, num_tensors={num_tensors}: expected no negative sizes.'
    )
  return num_tensors * math.prod(shape) * np.dtype(jnp.dtype(dtype)).itemsize
