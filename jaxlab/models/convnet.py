"""A small plain convolutional network, of the kind that small images are classified with in minutes."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from jaxlab.models.initializers import Initializer, torch_default, torch_default_bias
from jaxlab.models.intercept import HookPoint
from jaxlab.models.mlp import linear_layers
from jaxlab.models.normalization import BatchNorm
from jaxlab.models.resnet import check_images, square_conv

Array = jax.Array


class ConvNet(nn.Module):
  """3x3 convolutions with batch norms, ReLUs and 2x2 max-pooling, then linear layers over the flat map.

  Hook point `pool` behind the average pooling of the input; layer i is `conv{i}`, `bn{i}`, hook points
  `map{i}` (behind the ReLU) and `pool{i}`; hidden linear layers are `fc{i}` with hook points `relu{i}`, the
  classifier `fc`. Weights start as PyTorch's. Collections: `params`, `batch_stats`.

  Attributes:
    widths: channels of each convolution.
    input_pool: side of the average pooling that images are reduced by first; 1: none.
    pools: side of the max-pooling behind each convolution, 1 for none; one number for all.
    hidden: units of the hidden linear layers.
    num_classes: size of the classifier; None returns the features in front of it.
    norm_groups: groups of the batch with separate statistics, see `BatchNorm`.
    kernel_init: initializer of all kernels.
    dtype: of the computation; None: as the input.

  Raises:
    ValueError: at construction, for sizes below 1 or another number of `pools` than of convolutions; when
      called, for images that are no floats, or too small to be pooled.
  """

  widths: Sequence[int] = (16, 32)
  input_pool: int = 1
  pools: int | Sequence[int] = 2
  hidden: Sequence[int] = (128,)
  num_classes: int | None = None
  norm_groups: int = 1
  kernel_init: Initializer = torch_default
  dtype: Any = None

  def __post_init__(self):
    classes = () if self.num_classes is None else (self.num_classes,)
    pools = (self.pools,) * len(self.widths) if isinstance(self.pools, int) else tuple(self.pools)
    if min((*self.widths, *self.hidden, *pools, self.input_pool, *classes)) < 1 or not self.widths:
      raise ValueError(
        f'ConvNet: widths={tuple(self.widths)}, pools={self.pools}, hidden={tuple(self.hidden)}, '
        f'input_pool={self.input_pool} and num_classes={self.num_classes} must be positive.'
      )
    if len(pools) != len(self.widths):
      raise ValueError(f'ConvNet: pools={pools} for {len(self.widths)} convolutions.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns logits `[batch, num_classes]`, or features `[batch, channels]` without classifier."""
    check_images(x)
    pools = (self.pools,) * len(self.widths) if isinstance(self.pools, int) else self.pools
    smallest = self.input_pool
    for side in pools:
      smallest *= side
    if min(x.shape[1:3]) < smallest:
      raise ValueError(
        f'ConvNet: nothing is left of images of {x.shape[1]} x {x.shape[2]} pixels; give at least {smallest}.'
      )
    if self.input_pool > 1:
      x = nn.avg_pool(x, (self.input_pool,) * 2, (self.input_pool,) * 2)
    x = HookPoint(name='pool')(x)
    for index, (width, side) in enumerate(zip(self.widths, pools, strict=True)):
      bias_init = torch_default_bias(9 * x.shape[-1])
      options = {'use_bias': True, 'kernel_init': self.kernel_init, 'bias_init': bias_init}
      x = square_conv(width, 3, dtype=self.dtype, name=f'conv{index}', **options)(x)
      x = BatchNorm(groups=self.norm_groups, dtype=self.dtype, name=f'bn{index}')(x, train)
      x = HookPoint(name=f'map{index}')(nn.relu(x))
      if side > 1:
        x = nn.max_pool(x, (side, side), (side, side))
      x = HookPoint(name=f'pool{index}')(x)
    x = x.reshape(len(x), -1)
    return linear_layers(x, self.hidden, self.num_classes, self.kernel_init, self.dtype)
