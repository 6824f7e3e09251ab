"""The convolutional network of 13 layers of semi-supervised learning on small images."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.initializers import kaiming_normal_fan_in, torch_default, torch_default_bias
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import BatchNorm
from jaxlab.models.resnet import check_images, square_conv

Array = jax.Array


class CNN13(nn.Module):
  """CNN-13 over float images `[batch, height, width, channels]` (Laine & Aila 2017, table 5).

  Gaussian noise in training (`noise`); three 3x3 convolutions, 2x2 max-pooling and dropout, twice; a 3x3
  convolution without padding and two 1x1 ones; mean over positions `avgpool`; `fc`. Behind each convolution
  `conv{i}` a batch norm `bn{i}` and a leaky ReLU with slope 0.1, `map{i}`. Convolutions start normal with
  variance 2 / fan in. Collections: `params`, `batch_stats`; train mode needs the RNG `dropout`.

  Attributes:
    widths: channels of the convolutions: of the first three, the next three, and each of the last three.
    noise: deviation of the Gaussian noise on normalized images.
    dropout: probability of dropping an entry behind each pooling.
    num_classes: size of the classifier; None returns the pooled features.
    norm_groups: groups of the batch with separate statistics, see `BatchNorm`.
    dtype: of the computation (parameters and statistics stay float32); None: as the input.

  Raises:
    ValueError: at construction, if a field is out of its range; when called, for images of less than 12
      pixels a side.
  """

  widths: Sequence[int] = (128, 256, 512, 256, 128)
  noise: float = 0.15
  dropout: float = 0.5
  num_classes: int | None = None
  norm_groups: int = 1
  dtype: Any = None

  def __post_init__(self):
    if len(self.widths) != 5 or min(self.widths) < 1:
      raise ValueError(f'CNN13: widths={tuple(self.widths)}, expected five positive numbers.')
    if not 0 <= self.dropout < 1 or self.noise < 0:
      raise ValueError(
        f'CNN13: dropout={self.dropout}, noise={self.noise}: expected a probability below 1, and at least 0.'
      )
    if self.num_classes is not None and self.num_classes < 1:
      raise ValueError(f'CNN13: num_classes={self.num_classes}; give None for pooled features.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns logits `[batch, num_classes]`, or features `[batch, channels]` without classifier."""
    check_images(x)
    if min(x.shape[1:3]) < 12:
      raise ValueError(
        f'CNN13: nothing is left of images of {x.shape[1]} x {x.shape[2]} pixels; give at least 12.'
      )
    if train and self.noise > 0:
      x = x + self.noise * jax.random.normal(self.make_rng('dropout'), x.shape, x.dtype)
    x = HookPoint(name='noise')(x)
    first, second, *last = self.widths
    for stage, width in enumerate((first, second)):
      for index in range(3):
        x = self._layer(x, train, 3 * stage + index, width, 3)
      x = HookPoint(name=f'pool{stage}')(nn.max_pool(x, (2, 2), (2, 2)))
      x = nn.Dropout(self.dropout, name=f'dropout{stage}')(x, deterministic=not train)
    for index, (width, size) in enumerate(zip(last, (3, 1, 1), strict=True)):
      x = self._layer(x, train, 6 + index, width, size, padding='VALID')
    x = HookPoint(name='avgpool')(jnp.mean(x, (1, 2)))
    if self.num_classes is None:
      return x
    return nn.Dense(
      self.num_classes,
      kernel_init=torch_default,
      bias_init=torch_default_bias(x.shape[-1]),
      dtype=self.dtype,
      name='fc',
    )(x)

  def _layer(
    self, x: Array, train: bool, index: int, width: int, size: int, padding: str | None = None
  ) -> Array:
    """Returns convolution, norm and activation of `x`; called within the compact method."""
    options = {'use_bias': True, 'bias_init': torch_default_bias(size * size * x.shape[-1])}
    options |= {'kernel_init': kaiming_normal_fan_in, 'padding': padding, 'dtype': self.dtype}
    x = square_conv(width, size, name=f'conv{index}', **options)(x)
    x = BatchNorm(groups=self.norm_groups, dtype=self.dtype, name=f'bn{index}')(x, train)
    return HookPoint(name=f'map{index}')(nn.leaky_relu(x, 0.1))
