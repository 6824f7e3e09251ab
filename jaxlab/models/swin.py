"""Swin transformers (Liu et al. 2021, arXiv 2103.14030).

Modules are named as in timm, `layers.1.blocks.0.mlp.fc1` as `layers_1/blocks_0/mlp/fc1` (and `attn` as
`attention`, as in `ViT`).
"""

from collections.abc import Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlab.models.attention import attention_scores, softmax, weighted_values
from jaxlab.models.convolution import conv_general_dilated
from jaxlab.models.initializers import torch_default, torch_default_bias, vit_normal
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import LayerNorm
from jaxlab.models.resnet import check_images
from jaxlab.models.transformer_layers import Mlp, linear
from jaxlab.models.vit import draw_survival

Array = jax.Array
Size = tuple[int, int]


def partition_windows(x: Array, window: Size) -> Array:
  """Cuts `[batch, height, width, channels]` into `[batch * windows, tokens, channels]`.

  Windows in raster order, and in raster order within each; the sides are multiples of the window's.
  """
  return einops.rearrange(x, 'b (m h) (n w) c -> (b m n) (h w) c', h=window[0], w=window[1])


def merge_windows(x: Array, window: Size, grid: Size) -> Array:
  """Inverse of `partition_windows`, to `[batch, *grid, channels]`."""
  rows, columns = grid[0] // window[0], grid[1] // window[1]
  return einops.rearrange(
    x, '(b m n) (h w) c -> b (m h) (n w) c', m=rows, n=columns, h=window[0], w=window[1]
  )


def relative_position_index(window: Size) -> np.ndarray:
  """Returns the row of the bias table for each pair of a window's tokens, int32 `[tokens, tokens]`.

  For query `(r, c)` and key `(s, d)` of a window of height h and width w it is
  `(r - s + h - 1) (2 w - 1) + (c - d + w - 1)`.

  >>> relative_position_index((1, 3))
  array([[2, 1, 0],
         [3, 2, 1],
         [4, 3, 2]], dtype=int32)
  """
  rows, columns = (a.ravel() for a in np.mgrid[: window[0], : window[1]])
  down = rows[:, None] - rows + window[0] - 1
  right = columns[:, None] - columns + window[1] - 1
  return (down * (2 * window[1] - 1) + right).astype(np.int32)


def shifted_regions(grid: Size, window: Size, shift: Size) -> np.ndarray:
  """Returns the region of each token after the cyclic shift, int32 `[windows, tokens]`.

  A roll by `-shift` brings the first rows and columns behind the last ones, into their windows. Tokens of a
  window attend to each other only within one region: rows (columns) up to the last window, the rest of the
  last window, and the `shift` ones that came around. `grid` is that of full windows, padding included.
  """
  axes = []
  for size, side, step in zip(grid, window, shift, strict=True):
    position = np.arange(size)
    axes.append(np.int32(position >= size - side) + np.int32(position >= size - step))
  regions = 3 * axes[0][:, None] + axes[1]
  rows, columns = window
  return einops.rearrange(regions, '(m h) (n w) -> (m n) (h w)', h=rows, w=columns)


class WindowAttention(nn.Module):
  """Multi-head self-attention within windows, `softmax(q k^T / sqrt(head width) + bias) v`.

  The bias is a learned `relative_position_bias_table` `[(2 h - 1) (2 w - 1), heads]`, read by
  `relative_position_index`; -100 is added for pairs of different regions. Hook points as in `Attention` of
  ViTs: `query`, `key`, `value` `[batch * windows, tokens, heads, head width]` as projected, and `softmax`
  `[batch * windows, heads, queries, keys]`. The softmax is taken in at least float32.
  """

  num_heads: int
  window: Size
  qkv_bias: bool = True
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, regions: np.ndarray | None = None) -> Array:
    """Maps `[batch * windows, tokens, width]` to the same shape; `regions` `[windows, tokens]`."""
    windows, tokens, width = x.shape
    qkv = linear(3 * width, self.dtype, 'qkv', self.qkv_bias)(x)
    qkv = qkv.reshape(windows, tokens, 3, self.num_heads, width // self.num_heads)
    query, key, value = (
      HookPoint(name=name)(part[:, :, 0])
      for name, part in zip(('query', 'key', 'value'), jnp.split(qkv, 3, axis=2), strict=True)
    )
    scores = attention_scores(query, key)
    scores = scores + self._bias().astype(scores.dtype)
    if regions is not None:
      # Compared on the device: the constant is one number a token, not one a pair.
      regions = jnp.asarray(regions)
      apart = regions[:, :, None] != regions[:, None, :]
      mask = jnp.where(apart, -100, 0).astype(scores.dtype)
      by_window = scores.reshape(-1, len(regions), *scores.shape[1:]) + mask[:, None]
      scores = by_window.reshape(scores.shape)
    weights = HookPoint(name='softmax')(softmax(scores).astype(value.dtype))
    return linear(width, self.dtype, 'proj')(weighted_values(weights, value))

  def _bias(self) -> Array:
    rows = (2 * self.window[0] - 1) * (2 * self.window[1] - 1)
    table = self.param(
      'relative_position_bias_table', vit_normal, (rows, self.num_heads), jnp.float32
    )
    return einops.rearrange(table[relative_position_index(self.window)], 'q k h -> h q k')


class Block(nn.Module):
  """A pre-norm block: attention within windows, then MLP, each around a shortcut; `residual` between them.

  Attributes:
    num_heads: attention heads.
    window: height and width of a window.
    shift: rows and columns by which the windows are moved, by a cyclic shift of the feature map.
    mlp_ratio: hidden channels of the MLP over the channels.
    qkv_bias: whether the projection `qkv` has a bias.
    dtype: of the computation.
  """

  num_heads: int
  window: Size
  shift: Size = (0, 0)
  mlp_ratio: float = 4.0
  qkv_bias: bool = True
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, survival: Array | None = None) -> Array:
    """Maps `[batch, height, width, channels]` to the same shape.

    `survival` `[2, batch]` multiplies the two branches of each example (drop path): 0 or 1 / keep rate.
    """

    def branch(y: Array, index: int) -> Array:
      return y if survival is None else y * survival[index][:, None, None, None].astype(y.dtype)

    x = x + branch(self._attend(_layer_norm(self.dtype, 'norm1')(x)), 0)
    x = HookPoint(name='residual')(x)
    mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, name='mlp')
    return x + branch(mlp(_layer_norm(self.dtype, 'norm2')(x)), 1)

  def _attend(self, x: Array) -> Array:
    height, width = x.shape[1:3]
    if any(self.shift):
      x = jnp.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
    # As timm: zeros fill the last windows behind the shift, and are attended to like any token.
    bottom, right = -height % self.window[0], -width % self.window[1]
    x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))
    grid = height + bottom, width + right
    regions = shifted_regions(grid, self.window, self.shift) if any(self.shift) else None
    attention = WindowAttention(
      self.num_heads, self.window, self.qkv_bias, self.dtype, name='attention'
    )
    x = attention(partition_windows(x, self.window), regions)
    x = merge_windows(x, self.window, grid)[:, :height, :width]
    return jnp.roll(x, self.shift, (1, 2)) if any(self.shift) else x


class PatchMerging(nn.Module):
  """Joins each 2 x 2 neighborhood, column by column, and projects it: `reduction(norm(x))`."""

  width: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, height, width, channels]` to half the size, rounded up; zeros fill an odd side."""
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    x = einops.rearrange(x, 'b (m h) (n w) c -> b m n (w h c)', h=2, w=2)
    x = _layer_norm(self.dtype, 'norm')(x)
    return linear(self.width, self.dtype, 'reduction', use_bias=False)(x)


class Stage(nn.Module):
  """`downsample` (but in the first stage), then `blocks_i`; every other block shifts its windows.

  Attributes:
    depth: number of blocks.
    width: channels.
    downsample: whether patches are merged before the blocks.
    num_heads: see `Block`, as are the rest.
    window: see `Block`.
    shift: of the blocks with odd index.
    mlp_ratio: see `Block`.
    qkv_bias: see `Block`.
    dtype: see `Block`.
    remat: see `Swin`.
  """

  depth: int
  width: int
  downsample: bool
  num_heads: int
  window: Size
  shift: Size
  mlp_ratio: float = 4.0
  qkv_bias: bool = True
  dtype: Any = None
  remat: bool = False

  @nn.compact
  def __call__(self, x: Array, survival: Array | None = None) -> Array:
    """Maps a feature map to that of the stage; `survival` `[depth, 2, batch]` as in `Block`."""
    if self.downsample:
      x = PatchMerging(self.width, self.dtype, name='downsample')(x)
    block = nn.remat(Block) if self.remat else Block
    for index in range(self.depth):
      x = block(
        num_heads=self.num_heads,
        window=self.window,
        shift=self.shift if index % 2 else (0, 0),
        mlp_ratio=self.mlp_ratio,
        qkv_bias=self.qkv_bias,
        dtype=self.dtype,
        name=f'blocks_{index}',
      )(x, None if survival is None else survival[index])
    return x


class PatchEmbed(nn.Module):
  """Cuts images into patches, projects each (`proj`) and normalizes (`norm`)."""

  patch_size: int
  width: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, height, width, channels]` to `[batch, rows, columns, embedding]`."""
    patch = (self.patch_size, self.patch_size)
    x = nn.Conv(
      self.width,
      patch,
      strides=patch,
      padding='VALID',
      kernel_init=torch_default,
      bias_init=torch_default_bias(self.patch_size**2 * x.shape[-1]),
      conv_general_dilated=conv_general_dilated,
      dtype=self.dtype,
      name='proj',
    )(x)
    return _layer_norm(self.dtype, 'norm')(x)


class Head(nn.Module):
  """The classifier `fc` of the pooled features."""

  num_classes: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, channels]` to logits `[batch, num_classes]`."""
    return linear(self.num_classes, self.dtype, 'fc')(x)


class Swin(nn.Module):
  """A Swin transformer over float images `[batch, height, width, channels]`.

  `patch_embed`; stages `layers_i` of twice the channels and half the size each, with `downsample` at their
  start and `blocks_j`; `norm`; mean over positions `avgpool`; `head/fc`.

  Where a stage's feature map is no larger than the window, the window shrinks to it (each side by itself) and
  is not shifted, as in timm. A feature map that windows or 2 x 2 neighborhoods do not divide is filled with
  zeros at the bottom and right, and counts as the map that it becomes: sizes are halved rounding *up*, as in
  timm 1.0.31 (1.0.20 took windows from sizes rounded down: at 240 pixels its last stage, 8 x 8 tokens, has no
  shift). torchvision shifts and pads in the other order: its networks of such sizes are others.

  Attributes:
    patch_size: side of a patch in pixels.
    image_size: side, or (height, width), of the images.
    window_size: side, or (height, width), of a window in tokens; shifts are by half of it, rounded down.
    width: channels of a token in the first stage.
    depths: number of blocks of each stage.
    num_heads: attention heads of each stage (surplus entries are ignored).
    mlp_ratio: hidden channels of the MLP over the channels.
    num_classes: size of the classifier; None returns the pooled features.
    drop_path: chance that a branch of the last block is dropped for an example in training; falls linearly
      to 0 at the first block. Needs the rng stream `drop_path`.
    qkv_bias: whether the projections `qkv` have a bias.
    dtype: of the computation (parameters stay float32); None: as the input.
    remat: recompute each block's activations in the backward pass instead of storing them.

  Raises:
    ValueError: at construction, if `image_size` is not positive or not divisible by the patch, if heads do
      not divide the channels, or another field is out of range; when called, if the images have another size.
  """

  patch_size: int = 4
  image_size: int | Size = 224
  window_size: int | Size = 7
  width: int = 96
  depths: Sequence[int] = (2, 2, 6, 2)
  num_heads: Sequence[int] = (3, 6, 12, 24)
  mlp_ratio: float = 4.0
  num_classes: int | None = None
  drop_path: float = 0.0
  qkv_bias: bool = True
  dtype: Any = None
  remat: bool = False

  def __post_init__(self):
    height, width = _pair(self.image_size)
    if height % self.patch_size or width % self.patch_size:
      raise ValueError(
        f'Swin: an image of {height} x {width} pixels does not divide into patches of '
        f'patch_size={self.patch_size}; resize the image or change the patch.'
      )
    stages = len(self.depths)
    if len(self.num_heads) < stages:
      raise ValueError(f'Swin: {stages} stages need as many num_heads; got {self.num_heads}.')
    if min(height, width) < 1:
      raise ValueError(f'Swin: image_size={self.image_size} is not positive.')
    for stage, heads in enumerate(self.num_heads[:stages]):
      if self.width * 2**stage % heads:
        raise ValueError(
          f'Swin: num_heads[{stage}]={heads} does not divide the {self.width * 2**stage} channels.'
        )
    if min(_pair(self.window_size)) < 1:
      raise ValueError(f'Swin: window_size={self.window_size} is not positive.')
    if not 0 <= self.drop_path < 1:
      raise ValueError(f'Swin: drop_path={self.drop_path} is not in [0, 1).')
    if self.num_classes is not None and self.num_classes < 1:
      raise ValueError(f'Swin: num_classes={self.num_classes}; give None for pooled features.')
    super().__post_init__()

  def stage_grid(self, stage: int) -> Size:
    """Returns the size of a stage's feature map, from which its window follows."""
    height, width = (side // self.patch_size for side in _pair(self.image_size))
    return -(-height // 2**stage), -(-width // 2**stage)

  def stage_window(self, stage: int) -> tuple[Size, Size]:
    """Returns a stage's window and shift, (rows, columns) each."""
    sides = list(zip(self.stage_grid(stage), _pair(self.window_size), strict=True))
    window = tuple(min(size, side) for size, side in sides)
    shift = tuple(0 if size <= side else side // 2 for size, side in sides)
    return window, shift

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns logits `[batch, num_classes]`, or features `[batch, channels]` without classifier."""
    check_images(x)
    if x.shape[1:3] != _pair(self.image_size):
      raise ValueError(
        f'Swin for images of {_pair(self.image_size)} got {x.shape[1:3]}: give image_size={x.shape[1:3]}.'
      )
    survival = None
    if train and self.drop_path:
      rates = np.linspace(0, self.drop_path, sum(self.depths))
      survival = draw_survival(self.make_rng('drop_path'), rates, x.shape[0])
    x = PatchEmbed(self.patch_size, self.width, self.dtype, name='patch_embed')(x)
    first = 0
    for index, depth in enumerate(self.depths):
      window, shift = self.stage_window(index)
      stage = Stage(
        depth=depth,
        width=self.width * 2**index,
        downsample=index > 0,
        num_heads=self.num_heads[index],
        window=window,
        shift=shift,
        mlp_ratio=self.mlp_ratio,
        qkv_bias=self.qkv_bias,
        dtype=self.dtype,
        remat=self.remat,
        name=f'layers_{index}',
      )
      x = stage(x, None if survival is None else survival[first : first + depth])
      first += depth
    x = HookPoint(name='avgpool')(jnp.mean(_layer_norm(self.dtype, 'norm')(x), (1, 2)))
    return x if self.num_classes is None else Head(self.num_classes, self.dtype, name='head')(x)


def _pair(size: int | Sequence[int]) -> Size:
  return (size, size) if isinstance(size, int) else tuple(size)


def _layer_norm(dtype: Any, name: str) -> LayerNorm:
  """Returns Swin's LayerNorm; the two-pass variance survives outlier channels."""
  return LayerNorm(epsilon=1e-5, dtype=dtype, name=name)
