"""What a masked autoencoder does around its encoder: cutting, masking, restoring, positions, the decoder.

He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022 (https://arxiv.org/abs/2111.06377).
The loss is `jaxlab.losses.mae_loss`.
"""

import math
from collections.abc import Mapping
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlab.models.initializers import vit_normal
from jaxlab.models.intercept import Hook, capture
from jaxlab.models.normalization import LayerNorm
from jaxlab.models.transformer_layers import linear
from jaxlab.models.vit import Block, ViT


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


def encode_visible(
  vit: ViT, variables: Mapping[str, Any], images: jax.Array, keep: jax.Array, **kwargs: Any
) -> jax.Array:
  """Returns the normalized tokens of a ViT that sees some patches alone.

  All patches are projected and get their positions; those that are not kept are dropped before the first
  block.

  Args:
    vit: unscanned; any of its options.
    variables: its variables.
    images: `[batch, height, width, channels]`.
    keep: `[batch, num_kept]`, positions of the patches, see `random_masking`.
    **kwargs: passed to the model.

  Returns:
    `[batch, prefix tokens + num_kept, width]`, patches in the order of `keep`.

  Raises:
    ValueError: for a ViT with `scan`, whose blocks cannot be told apart.
  """
  if vit.scan:
    raise ValueError('encode_visible takes a ViT with scan=False.')
  prefix = vit.num_prefix_tokens

  def visible(site: Any, x: jax.Array) -> jax.Array:
    del site
    return jnp.concatenate([x[:, :prefix], keep_tokens(x[:, prefix:], keep)], axis=1)

  drop = Hook('blocks_0', input=visible)
  return capture(vit, variables, ['norm'], images, hooks=[drop], **kwargs)[1]['norm']


class MAEDecoder(nn.Module):
  """The decoder of a masked autoencoder: from the tokens of the visible patches to the pixels of all.

  `embed`, mask tokens at the places of the missing patches, the fixed code of `sincos_2d`, `blocks_i`,
  `norm`, `pred`.

  Attributes:
    patch_size: side of a patch in pixels.
    grid: rows and columns of patches.
    channels: of the images.
    width: channels of a token.
    depth: number of blocks.
    num_heads: attention heads.
    mlp_ratio: hidden channels of the MLP over `width`.
    dtype: of the computation; None: as the input.
  """

  patch_size: int
  grid: tuple[int, int]
  channels: int = 3
  width: int = 512
  depth: int = 8
  num_heads: int = 16
  mlp_ratio: float = 4.0
  dtype: Any = None

  @nn.compact
  def __call__(self, tokens: jax.Array, restore: jax.Array) -> jax.Array:
    """Returns pixels `[batch, num_patches, patch_size * patch_size * channels]`, see `patchify`.

    Args:
      tokens: `[batch, 1 + num_kept, encoder width]`, the class token first.
      restore: `[batch, num_patches]`, see `random_masking`.
    """
    x = linear(self.width, self.dtype, 'embed')(tokens)
    # Three axes, as in the official code: weight decay spares what has one.
    mask_token = self.param('mask_token', vit_normal, (1, 1, self.width), jnp.float32)
    x = jnp.concatenate([x[:, :1], restore_tokens(x[:, 1:], mask_token, restore)], axis=1)
    x = x + sincos_2d(self.width, self.grid, class_token=True, dtype=x.dtype)
    for index in range(self.depth):
      x = Block(self.num_heads, self.mlp_ratio, dtype=self.dtype, name=f'blocks_{index}')(x)
    x = LayerNorm(1e-6, self.dtype, name='norm')(x)
    return linear(self.patch_size**2 * self.channels, self.dtype, 'pred')(x)[:, 1:]
