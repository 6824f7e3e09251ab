"""What a masked autoencoder does around its transformers: cutting, masking, restoring, positions.

He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022 (https://arxiv.org/abs/2111.06377).
The loss is `jaxlab.losses.mae_loss`.
"""

from __future__ import annotations

import math

import einops
import jax
import jax.numpy as jnp
import numpy as np


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
  """Cuts images into patches, in raster order.

  Args:
    images: `[batch, height, width, channels]`.
    patch_size: side of a patch, in pixels.

  Returns:
    `[batch, num_patches, patch_size * patch_size * channels]`; within a patch the order is row, column,
    channel.

  Raises:
    ValueError: if height or width is no multiple of `patch_size`.
  """
  if images.ndim != 4:
    raise ValueError(f'images must be [batch, height, width, channels], got {images.shape}.')
  if patch_size < 1 or images.shape[1] % patch_size or images.shape[2] % patch_size:
    raise ValueError(
      f'Images of {images.shape[1]}x{images.shape[2]} cannot be cut into patches of {patch_size}x'
      f'{patch_size}: height and width must be multiples of patch_size.'
    )
  return einops.rearrange(images, 'b (h p) (w q) c -> b (h w) (p q c)', p=patch_size, q=patch_size)


def unpatchify(
  patches: jax.Array, patch_size: int, grid: tuple[int, int] | None = None
) -> jax.Array:
  """Puts patches together again: the inverse of `patchify`.

  Args:
    patches: `[batch, num_patches, patch_size * patch_size * channels]`.
    patch_size: side of a patch, in pixels.
    grid: rows and columns of patches; if None, the image is square.

  Returns:
    `[batch, height, width, channels]`.

  Raises:
    ValueError: if the number of patches is no square (or not that of `grid`), or a patch's length is no
      multiple of `patch_size ** 2`.
  """
  num_patches, length = patches.shape[1:]
  rows, columns = grid or (math.isqrt(num_patches),) * 2
  if rows * columns != num_patches:
    raise ValueError(
      f'{num_patches} patches do not fill a grid of {rows}x{columns}'
      f'{": pass grid=(rows, columns)." if grid is None else "."}'
    )
  if length % patch_size**2:
    raise ValueError(
      f'Patches of {length} values are not {patch_size}x{patch_size} pixels of whole channels.'
    )
  return einops.rearrange(
    patches, 'b (h w) (p q c) -> b (h p) (w q) c', h=rows, p=patch_size, q=patch_size
  )


def random_masking(noise: jax.Array, ratio: float) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Chooses the patches to keep: those with the smallest noise.

  Args:
    noise: `[batch, num_patches]`, uniform random numbers.
    ratio: share of the patches to remove; `int(num_patches * (1 - ratio))` are kept.

  Returns:
    `(keep, mask, restore)`: `keep`, `[batch, num_kept]` int32, positions of the kept patches by
    increasing noise (see `keep_tokens`); `mask`, `[batch, num_patches]` float32, 1 for a removed patch;
    `restore`, `[batch, num_patches]` int32, the rank of each patch (see `restore_tokens`).

  Raises:
    ValueError: if `ratio` is not in [0, 1), or if no patch would be kept.
  """
  if not 0 <= ratio < 1:
    raise ValueError(f'ratio must be in [0, 1), got {ratio}.')
  num_patches = noise.shape[1]
  num_kept = int(num_patches * (1 - ratio))
  if num_kept < 1:
    raise ValueError(f'A ratio of {ratio} keeps none of {num_patches} patches: lower it.')
  order = jnp.argsort(noise, axis=1)
  restore = jnp.argsort(order, axis=1)
  mask = (restore >= num_kept).astype(jnp.float32)
  return order[:, :num_kept].astype(jnp.int32), mask, restore.astype(jnp.int32)


def keep_tokens(tokens: jax.Array, keep: jax.Array) -> jax.Array:
  """Returns the tokens at the positions `keep`: `[batch, num_patches, dim] -> [batch, num_kept, dim]`."""
  return jnp.take_along_axis(tokens, keep[..., None], axis=1)


def restore_tokens(kept: jax.Array, mask_token: jax.Array, restore: jax.Array) -> jax.Array:
  """Puts kept tokens back to their places and the mask token everywhere else.

  Args:
    kept: `[batch, num_kept, dim]`.
    mask_token: `[dim]`, or anything that broadcasts to the missing tokens.
    restore: `[batch, num_patches]`, from `random_masking`.

  Returns:
    `[batch, num_patches, dim]`.
  """
  batch, num_kept, dim = kept.shape
  missing = jnp.broadcast_to(mask_token, (batch, restore.shape[1] - num_kept, dim))
  tokens = jnp.concatenate([kept, missing.astype(kept.dtype)], axis=1)
  return jnp.take_along_axis(tokens, restore[..., None], axis=1)


def sincos_2d(
  dim: int,
  grid: int | tuple[int, int],
  *,
  class_token: bool = False,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """Fixed position code of a grid of patches.

  The first half of the channels encodes a patch's column, the second half its row, each as
  `[sin(position * w), cos(position * w)]` with `w_i = 10000 ** (-i / (dim / 4))`, `i = 0 ... dim / 4 - 1`.

  Args:
    dim: number of channels, a multiple of 4.
    grid: patches per side, or `(rows, columns)`.
    class_token: put a row of zeros first, for the class token.
    dtype: of the result.

  Returns:
    `[rows * columns (+ 1), dim]`, patches in raster order.

  Raises:
    ValueError: if `dim` is no positive multiple of 4.
  """
  if dim < 4 or dim % 4:
    raise ValueError(f'dim must be a positive multiple of 4, got {dim}.')
  rows, columns = (grid, grid) if isinstance(grid, int) else grid
  frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))

  def encode(position):
    angles = position.reshape(-1, 1) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

  row, column = np.indices((rows, columns))
  code = np.concatenate([encode(column), encode(row)], axis=1)
  if class_token:
    code = np.concatenate([np.zeros((1, dim)), code])
  return jnp.asarray(code, dtype)
