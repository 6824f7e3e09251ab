"""Position embeddings of vision transformers on grids of another size."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@functools.cache
def bicubic_matrix(old: int, new: int, a: float = -0.75) -> np.ndarray:
  """Returns the matrix `[new, old]` of bicubic interpolation along one axis, as PyTorch's.

  Output `i` reads at `(i + 0.5) * old / new - 0.5` (`align_corners=False`) with the four taps of Keys'
  cubic kernel; indices are clamped to the border; shrinking does not smooth (`antialias=False`).
  `jax.image.resize` has a = -0.5 and smooths.
  """
  position = (np.arange(new) + 0.5) * old / new - 0.5
  base = np.floor(position).astype(int)
  matrix = np.zeros((new, old))
  for tap in range(-1, 3):
    distance = np.abs(position - (base + tap))
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
    np.add.at(matrix, (np.arange(new), np.clip(base + tap, 0, old - 1)), weight)
  return matrix


def resample_position_embedding(
  pos_embed: Array,
  new_grid: int | tuple[int, int],
  *,
  num_prefix_tokens: int = 1,
  old_grid: tuple[int, int] | None = None,
) -> Array:
  """Resamples a position embedding to another grid of patches.

  The rows of the prefix tokens (class, distillation) are kept; the others, a grid in raster order, are
  interpolated bicubically by `bicubic_matrix`, as DeiT's fine-tuning and torchvision's
  `interpolate_embeddings` do. timm's `resample_abs_pos_embed` is another function: it smooths
  (`antialias=True`) and, as PIL, has a = -0.5. Linear in `pos_embed`.

  Args:
    pos_embed: `[1, num_prefix_tokens + rows * columns, channels]`.
    new_grid: `(rows, columns)`, or one number for a square.
    num_prefix_tokens: number of leading tokens that have no place in the grid.
    old_grid: `(rows, columns)` of `pos_embed`; None: a square.

  Returns:
    `[1, num_prefix_tokens + new rows * new columns, channels]`.

  Raises:
    ValueError: if the tokens do not fill `old_grid`, or no square where it is None.
  """
  rows, columns = (new_grid, new_grid) if isinstance(new_grid, int) else map(int, new_grid)
  num_patches = pos_embed.shape[1] - num_prefix_tokens
  if old_grid is None:
    side = math.isqrt(max(num_patches, 0))
    old_grid = (side, side)
  if num_patches < 1 or old_grid[0] * old_grid[1] != num_patches:
    raise ValueError(
      f'pos_embed holds {pos_embed.shape[1]} tokens; without {num_prefix_tokens} prefix tokens they are '
      f'no grid of {old_grid[0]} x {old_grid[1]}. Give num_prefix_tokens and old_grid.'
    )
  if (rows, columns) == tuple(old_grid):
    return pos_embed
  prefix, patches = jnp.split(pos_embed, [num_prefix_tokens], axis=1)
  dtype = jnp.promote_types(pos_embed.dtype, jnp.float32)
  patches = patches.reshape(*old_grid, -1).astype(dtype)
  patches = jnp.einsum(
    'rh,cw,hwd->rcd',
    bicubic_matrix(old_grid[0], rows).astype(dtype),
    bicubic_matrix(old_grid[1], columns).astype(dtype),
    patches,
    precision='highest',
  )
  patches = patches.reshape(1, rows * columns, -1).astype(pos_embed.dtype)
  return jnp.concatenate([prefix, patches], axis=1)
