"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545).

Modules are named as in timm, `stages.1.blocks.0.mlp.fc1` as `stages_1/blocks_0/mlp/fc1`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlab.models.convolution import conv_general_dilated
from jaxlab.models.initializers import vit_normal
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import LayerNorm
from jaxlab.models.resnet import check_images, square_conv
from jaxlab.models.transformer_layers import LayerScale, Mlp, linear
from jaxlab.models.vit import draw_survival

Array = jax.Array


class Block(nn.Module):
  """A depthwise convolution, a norm over channels and an MLP, scaled by `ls`, around a shortcut.

  Attributes:
    kernel_size: of `conv_dw`.
    mlp_ratio: hidden channels of the MLP over the channels.
    layer_scale: initial factor of `ls`; None: there is none.
    dtype: of the computation.
  """

  kernel_size: int = 7
  mlp_ratio: float = 4.0
  layer_scale: float | None = 1e-6
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, survival: Array | None = None) -> Array:
    """Maps `[batch, height, width, channels]` to the same shape.

    `survival` `[batch]` multiplies the branch of each example (drop path): 0 or 1 / keep rate.
    """
    width = x.shape[-1]
    y = square_conv(
      width,
      self.kernel_size,
      groups=width,
      kernel_init=vit_normal,
      use_bias=True,
      dtype=self.dtype,
      name='conv_dw',
    )(x)
    y = LayerNorm(1e-6, self.dtype, name='norm')(y)
    y = Mlp(int(width * self.mlp_ratio), self.dtype, name='mlp')(y)
    if self.layer_scale is not None:
      y = LayerScale(self.layer_scale, self.dtype, name='ls')(y)
    if survival is not None:
      y = y * survival[:, None, None, None].astype(y.dtype)
    return x + y


class Downsample(nn.Module):
  """A norm over channels, and a 2x2 convolution `reduction` of stride 2."""

  width: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, height, width, channels]` to half the size, rounded down."""
    x = LayerNorm(1e-6, self.dtype, name='norm')(x)
    return _patches(self.width, 2, self.dtype, 'reduction')(x)


class Stage(nn.Module):
  """`downsample` (but in the first stage), then `blocks_i`.

  Attributes:
    depth: number of blocks.
    width: channels.
    downsample: whether the size is halved before the blocks.
    kernel_size: see `Block`, as are the rest.
    mlp_ratio: see `Block`.
    layer_scale: see `Block`.
    dtype: see `Block`.
    remat: see `ConvNeXt`.
  """

  depth: int
  width: int
  downsample: bool
  kernel_size: int = 7
  mlp_ratio: float = 4.0
  layer_scale: float | None = 1e-6
  dtype: Any = None
  remat: bool = False

  @nn.compact
  def __call__(self, x: Array, survival: Array | None = None) -> Array:
    """Maps a feature map to that of the stage; `survival` `[depth, batch]` as in `Block`."""
    if self.downsample:
      x = Downsample(self.width, self.dtype, name='downsample')(x)
    block = nn.remat(Block) if self.remat else Block
    for index in range(self.depth):
      own = None if survival is None else survival[index]
      x = block(
        self.kernel_size, self.mlp_ratio, self.layer_scale, self.dtype, name=f'blocks_{index}'
      )(x, own)
    return x


class Head(nn.Module):
  """A norm of the pooled features, and the classifier `fc`, if there are classes."""

  num_classes: int | None = None
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, channels]` to logits `[batch, num_classes]`, or to normalized features."""
    x = LayerNorm(1e-6, self.dtype, name='norm')(x)
    return x if self.num_classes is None else linear(self.num_classes, self.dtype, 'fc')(x)


class ConvNeXt(nn.Module):
  """A ConvNeXt over float images `[batch, height, width, channels]`.

  Patches `stem_0` with norm `stem_1`; stages `stages_i` of `downsample` and `blocks_j`; mean over positions
  `avgpool`; `head/norm`, `head/fc`. Collection: `params`.

  Attributes:
    depths: number of blocks of each stage.
    widths: channels of each stage.
    patch_size: side of a patch of the stem in pixels.
    kernel_size: of the depthwise convolutions.
    mlp_ratio: hidden channels of the MLPs over the channels.
    layer_scale: initial factor of the `LayerScale`s behind all branches; None: there are none.
    num_classes: size of the classifier; None returns the pooled, normalized features.
    drop_path: chance that the branch of the last block is dropped for an example in training; falls linearly
      to 0 at the first block. Needs the rng stream `drop_path`.
    dtype: of the computation (parameters stay float32); None: as the input.
    remat: recompute each block's activations in the backward pass instead of storing them.

  Raises:
    ValueError: at construction, if a field is out of its range; when called, for images that leave nothing to
      the last stage.
  """

  depths: Sequence[int] = (3, 3, 9, 3)
  widths: Sequence[int] = (96, 192, 384, 768)
  patch_size: int = 4
  kernel_size: int = 7
  mlp_ratio: float = 4.0
  layer_scale: float | None = 1e-6
  num_classes: int | None = None
  drop_path: float = 0.0
  dtype: Any = None
  remat: bool = False

  def __post_init__(self):
    if len(self.widths) < len(self.depths):
      raise ValueError(
        f'ConvNeXt: {len(self.depths)} stages need as many widths; got {tuple(self.widths)}.'
      )
    if self.kernel_size % 2 == 0:
      raise ValueError(f'ConvNeXt: kernel_size={self.kernel_size} is even.')
    if not 0 <= self.drop_path < 1:
      raise ValueError(f'ConvNeXt: drop_path={self.drop_path} is not in [0, 1).')
    if self.num_classes is not None and self.num_classes < 1:
      raise ValueError(f'ConvNeXt: num_classes={self.num_classes}; give None for pooled features.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns logits `[batch, num_classes]`, or features `[batch, channels]` without classifier."""
    check_images(x)
    smallest = self.patch_size * 2 ** (len(self.depths) - 1)
    if min(x.shape[1:3]) < smallest:
      raise ValueError(
        f'ConvNeXt: images of {x.shape[1]} x {x.shape[2]} pixels leave nothing to the last of '
        f'{len(self.depths)} stages; give at least {smallest}.'
      )
    survival = None
    if train and self.drop_path:
      rates = np.linspace(0, self.drop_path, sum(self.depths))
      survival = draw_survival(self.make_rng('drop_path'), rates, x.shape[0])[:, 0]
    x = _patches(self.widths[0], self.patch_size, self.dtype, 'stem_0')(x)
    x = LayerNorm(1e-6, self.dtype, name='stem_1')(x)
    first = 0
    for index, depth in enumerate(self.depths):
      stage = Stage(
        depth=depth,
        width=self.widths[index],
        downsample=index > 0,
        kernel_size=self.kernel_size,
        mlp_ratio=self.mlp_ratio,
        layer_scale=self.layer_scale,
        dtype=self.dtype,
        remat=self.remat,
        name=f'stages_{index}',
      )
      x = stage(x, None if survival is None else survival[first : first + depth])
      first += depth
    x = HookPoint(name='avgpool')(jnp.mean(x, (1, 2)))
    return Head(self.num_classes, self.dtype, name='head')(x)


def _patches(width: int, size: int, dtype: Any, name: str) -> nn.Conv:
  """Returns a convolution whose stride is its kernel size."""
  conv = functools.partial(nn.Conv, conv_general_dilated=conv_general_dilated)
  return conv(
    width,
    (size, size),
    strides=(size, size),
    padding='VALID',
    kernel_init=vit_normal,
    dtype=dtype,
    name=name,
  )
