"""VGG (Simonyan & Zisserman 2015, arXiv 1409.1556), with and without batch norm, as in timm."""

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
from jaxlab.models.normalization import BatchNorm
from jaxlab.models.resnet import check_images, square_conv
from jaxlab.models.swin import Head

Array = jax.Array


class Block(nn.Module):
  """`relu(bn(conv(x)))` with a 3x3 convolution; `bn` only with `batch_norm`."""

  features: int
  batch_norm: bool = False
  norm_groups: int = 1
  dtype: Any = None
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[batch, height, width, channels]` to `[batch, height, width, features]`."""
    x = square_conv(self.features, 3, use_bias=self.use_bias, dtype=self.dtype, name='conv')(x)
    if self.batch_norm:
      x = BatchNorm(groups=self.norm_groups, dtype=self.dtype, name='bn')(x, train)
    return HookPoint(name='relu')(nn.relu(x))


class PreLogits(nn.Module):
  """The hidden layers as convolutions: `fc1` over a window, then `fc2`, each behind it a ReLU `act1`, `act2`.

  Feature maps that are smaller than the window are brought to its size by `adaptive_average`.
  """

  hidden: int
  window: int = 7
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, height, width, channels]` to `[batch, height - 6, width - 6, hidden]` (at least 1)."""
    height, width = (max(side, self.window) for side in x.shape[1:3])
    x = adaptive_average(x, height, width)
    conv = functools.partial(
      nn.Conv,
      self.hidden,
      padding='VALID',
      kernel_init=vit_normal,
      conv_general_dilated=conv_general_dilated,
      dtype=self.dtype,
    )
    x = HookPoint(name='act1')(nn.relu(conv(kernel_size=(self.window,) * 2, name='fc1')(x)))
    return HookPoint(name='act2')(nn.relu(conv(kernel_size=(1, 1), name='fc2')(x)))


class VGG(nn.Module):
  """A VGG network over float images `[batch, height, width, channels]`.

  The stem `conv1` (with `bn1`) and `relu1`; blocks `blocks_i_j` of the stages, of which the stem is the first
  (there is no `blocks_0_0`), each stage followed by 2x2 max-pooling `pool_i`; hidden layers `pre_logits/fc1`
  and `pre_logits/fc2`; mean over positions `avgpool`; `head/fc`. Collections: `params`, and `batch_stats`
  with batch norm. Without hidden layers it is a plain stack of convolutions under global average pooling.

  Attributes:
    stage_sizes: number of convolutions of each stage.
    widths: channels of each stage.
    batch_norm: whether a batch norm is behind each convolution.
    hidden: channels of the two hidden layers; None: there are none, `avgpool` is over the last pooled map.
    num_classes: size of the classifier; None returns the pooled features.
    conv_bias: whether convolutions have a bias.
    norm_groups: groups of the batch with separate statistics, see `BatchNorm`.
    conv_widths: channels of each convolution in order, of a pruned network (`jaxlab.compression`); None:
      `widths` of its stage.
    dtype: of the computation (parameters and statistics stay float32); None: as the input.
    remat: recompute each block's activations in the backward pass instead of storing them.

  Raises:
    ValueError: at construction, if a field is out of its range; when called, for images of less than 32
      pixels a side (with five stages).
  """

  stage_sizes: Sequence[int] = (2, 2, 3, 3, 3)
  widths: Sequence[int] = (64, 128, 256, 512, 512)
  batch_norm: bool = False
  hidden: int | None = 4096
  num_classes: int | None = None
  conv_bias: bool = True
  norm_groups: int = 1
  conv_widths: Sequence[int] | None = None
  dtype: Any = None
  remat: bool = False

  def __post_init__(self):
    if len(self.widths) < len(self.stage_sizes) or min(self.stage_sizes, default=0) < 1:
      raise ValueError(
        f'VGG: {len(self.stage_sizes)} stages of at least one convolution need as many widths; got '
        f'stage_sizes={tuple(self.stage_sizes)}, widths={tuple(self.widths)}.'
      )
    if self.conv_widths is not None and len(self.conv_widths) != sum(self.stage_sizes):
      raise ValueError(
        f'VGG: conv_widths needs {sum(self.stage_sizes)} entries, got {self.conv_widths}.'
      )
    if self.num_classes is not None and self.num_classes < 1:
      raise ValueError(f'VGG: num_classes={self.num_classes}; give None for pooled features.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns logits `[batch, num_classes]`; without classifier features, `[batch, hidden or widths[-1]]`."""
    x = self._maps(x, train)
    if self.hidden is not None:
      x = PreLogits(self.hidden, dtype=self.dtype, name='pre_logits')(x)
    x = HookPoint(name='avgpool')(jnp.mean(x, (1, 2)))
    if self.num_classes is None:
      return x
    return Head(self.num_classes, self.dtype, name='head')(x)

  def _maps(self, x: Array, train: bool, last_pool: bool = True) -> Array:
    """Returns the last feature map, behind its max-pooling or in front of it; for compact methods."""
    check_images(x)
    if min(x.shape[1:3]) < 2 ** len(self.stage_sizes):
      raise ValueError(
        f'VGG: images of {x.shape[1]} x {x.shape[2]} pixels leave nothing behind {len(self.stage_sizes)} '
        f'stages; give at least {2 ** len(self.stage_sizes)}.'
      )
    stages = zip(self.widths, self.stage_sizes)
    widths = iter(self.conv_widths or [width for width, size in stages for _ in range(size)])
    biased = {'use_bias': self.conv_bias, 'dtype': self.dtype}
    x = square_conv(next(widths), 3, **biased, name='conv1')(x)
    if self.batch_norm:
      x = BatchNorm(groups=self.norm_groups, dtype=self.dtype, name='bn1')(x, train)
    x = HookPoint(name='relu1')(nn.relu(x))
    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    for stage, size in enumerate(self.stage_sizes):
      for index in range(1 if stage == 0 else 0, size):
        own = block(
          next(widths),
          self.batch_norm,
          self.norm_groups,
          self.dtype,
          self.conv_bias,
          name=f'blocks_{stage}_{index}',
        )
        x = own(x, train)
      if last_pool or stage < len(self.stage_sizes) - 1:
        x = HookPoint(name=f'pool_{stage}')(nn.max_pool(x, (2, 2), (2, 2)))
    return x


def adaptive_average(x: Array, height: int, width: int) -> Array:
  """Returns `x` `[batch, rows, columns, channels]` at another size, as PyTorch's adaptive average pooling.

  Output i of n averages the inputs from `floor(i m / n)` to `ceil((i + 1) m / n) - 1` of m.
  """
  for axis, size in ((1, height), (2, width)):
    old = x.shape[axis]
    if old == size:
      continue
    index, source = np.arange(size)[:, None], np.arange(old)
    inside = (source >= index * old // size) & (source < -(-(index + 1) * old // size))
    weights = jnp.asarray(inside / inside.sum(1, keepdims=True), x.dtype)
    x = jnp.moveaxis(jnp.tensordot(weights, x, (1, axis)), 0, axis)
  return x
