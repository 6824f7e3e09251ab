"""Shake-Shake networks (Gastaldi 2017, arXiv 1705.07485) as Mean Teacher's code builds them.

Modules are named as there, `layer1.0.conv_a1` as `layer1_0/conv_a1`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.initializers import torch_default, torch_default_bias
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import BatchNorm
from jaxlab.models.resnet import check_images, square_conv

Array = jax.Array


@jax.custom_vjp
def shake(a: Array, b: Array, forward: Array, backward: Array) -> Array:
  """Mixes two branches by one share, and their gradients by another.

    y = forward * a + (1 - forward) * b;  dL/da = backward * dL/dy,  dL/db = (1 - backward) * dL/dy

  In training both shares are uniform in [0, 1), drawn for each example; in evaluation they are 1/2. Shares
  carry no gradient.

  Args:
    a: `[batch, ...]`.
    b: of the same shape.
    forward: shares of `a` in the result, `[batch]`.
    backward: its shares of the gradient, `[batch]`.

  Returns:
    `y`, like `a`.

  Raises:
    ValueError: if shapes do not fit together.

  Examples:
    >>> a, b, quarter = jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.array([0.25])
    >>> shake(a, b, quarter, 1 - quarter).tolist()
    [[0.25, 0.25]]
    >>> jax.grad(lambda a: shake(a, b, quarter, 1 - quarter).sum())(a).tolist()
    [[0.75, 0.75]]
  """
  if a.shape != b.shape:
    raise ValueError(f'shake: branches must have one shape, got {a.shape} and {b.shape}.')
  for name, share in (('forward', forward), ('backward', backward)):
    if share.shape != a.shape[:1]:
      raise ValueError(f'shake: {name} must be {list(a.shape[:1])}, got {list(share.shape)}.')
  share = _share_of(forward, a)
  return share * a + (1 - share) * b


def _share_of(share: Array, like: Array) -> Array:
  return share.astype(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _shake_forward(
  a: Array, b: Array, forward: Array, backward: Array
) -> tuple[Array, tuple[Array, Array]]:
  return shake(a, b, forward, backward), (forward, backward)


def _shake_backward(
  kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array, Array, Array]:
  forward, backward = kept
  share = _share_of(backward, gradient)
  of_a, of_b = share * gradient, (1 - share) * gradient
  return of_a, of_b, jnp.zeros_like(forward), jnp.zeros_like(backward)


shake.defvjp(_shake_forward, _shake_backward)


class ShiftConvDownsample(nn.Module):
  """A shortcut that halves the sides: two copies, one a pixel on, each through a 1x1 convolution of its own.

  Even rows and columns, and odd ones, next to one another on the channels; ReLU; 1x1 convolution `conv` in
  two groups, with bias; `bn`.

  Attributes:
    features: channels of the result, even.
    norm_groups: see `BatchNorm`.
    dtype: of the computation; None: as the input.
  """

  features: int
  norm_groups: int = 1
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[batch, height, width, channels]`, of even sides, to half the sides and `features` channels."""
    if x.shape[1] % 2 or x.shape[2] % 2:
      raise ValueError(
        f'ShiftConvDownsample: maps of {x.shape[1]} x {x.shape[2]} cannot be halved; give images whose sides '
        'are multiples of 4.'
      )
    bias_init = torch_default_bias(x.shape[-1])
    options = {'use_bias': True, 'bias_init': bias_init, 'dtype': self.dtype}
    x = nn.relu(jnp.concatenate([x[:, ::2, ::2], x[:, 1::2, 1::2]], -1))
    x = square_conv(self.features, 1, groups=2, name='conv', **options)(x)
    return BatchNorm(groups=self.norm_groups, dtype=self.dtype, name='bn')(x, train)


class ShakeShakeBlock(nn.Module):
  """Two branches, mixed by `shake`, around a shortcut; there is no ReLU behind the sum.

  Branch a: ReLU, `conv_a1` (3x3, stride), `bn_a1`, ReLU, `conv_a2` (3x3), `bn_a2`; likewise b. Where the
  shape changes, the shortcut is a 1x1 convolution and norm (`downsample_0`, `downsample_1`), or with stride 2
  the `ShiftConvDownsample` `downsample`. Train mode draws from the RNG `dropout`.

  Attributes:
    features: channels of the result.
    stride: 1 or 2.
    norm_groups: see `BatchNorm`.
    dtype: of the computation; None: as the input.
  """

  features: int
  stride: int = 1
  norm_groups: int = 1
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[batch, height, width, channels]` to `[batch, height/stride, width/stride, features]`."""
    norm = functools.partial(BatchNorm, groups=self.norm_groups, dtype=self.dtype)
    ends = []
    for branch in 'ab':
      y = HookPoint(name=f'relu_{branch}1')(nn.relu(x))
      y = self._conv(3, self.stride, f'conv_{branch}1')(y)
      y = norm(name=f'bn_{branch}1')(y, train)
      y = HookPoint(name=f'relu_{branch}2')(nn.relu(y))
      y = self._conv(3, 1, f'conv_{branch}2')(y)
      ends.append(norm(name=f'bn_{branch}2')(y, train))
    if self.stride == 2:
      options = {'norm_groups': self.norm_groups, 'dtype': self.dtype, 'name': 'downsample'}
      x = ShiftConvDownsample(self.features, **options)(x, train)
    elif x.shape[-1] != self.features:
      x = norm(name='downsample_1')(self._conv(1, 1, 'downsample_0')(x), train)
    if train:
      shares = jax.random.uniform(self.make_rng('dropout'), (2, len(x)))
    else:
      shares = jnp.full((2, len(x)), 0.5)
    return x + shake(*ends, *shares)

  def _conv(self, size: int, stride: int, name: str) -> nn.Module:
    return square_conv(self.features, size, stride, dtype=self.dtype, name=name)


class ShakeShake(nn.Module):
  """A Shake-Shake network over float images `[batch, height, width, channels]`, sides multiples of 4.

  `conv1` (3x3, without norm and ReLU); blocks `layer{i}_{j}`; mean over positions `avgpool`; `fc`. The
  defaults are Shake-Shake-26 2x96d. Convolutions start normal with variance 2 / (kernel area * features).
  Collections: `params`, `batch_stats`; train mode needs the RNG `dropout`.

  Attributes:
    stage_sizes: number of blocks of each stage.
    widths: channels of each stage.
    stem_width: channels of `conv1`.
    num_classes: size of the classifier; None returns the pooled features.
    norm_groups: groups of the batch with separate statistics, see `BatchNorm`.
    dtype: of the computation (parameters and statistics stay float32); None: as the input.
    remat: recompute each block's activations in the backward pass instead of storing them.

  Raises:
    ValueError: at construction, if a field is out of its range.
  """

  stage_sizes: Sequence[int] = (4, 4, 4)
  widths: Sequence[int] = (96, 192, 384)
  stem_width: int = 16
  num_classes: int | None = None
  norm_groups: int = 1
  dtype: Any = None
  remat: bool = False

  def __post_init__(self):
    if len(self.widths) < len(self.stage_sizes) or min(self.stage_sizes, default=0) < 1:
      raise ValueError(
        f'ShakeShake: {len(self.stage_sizes)} stages of at least one block need as many widths; got '
        f'stage_sizes={tuple(self.stage_sizes)}, widths={tuple(self.widths)}.'
      )
    if any(width < 2 or width % 2 for width in self.widths):
      raise ValueError(f'ShakeShake: widths={tuple(self.widths)}, expected even numbers.')
    if self.num_classes is not None and self.num_classes < 1:
      raise ValueError(
        f'ShakeShake: num_classes={self.num_classes}; give None for pooled features.'
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns logits `[batch, num_classes]`, or features `[batch, channels]` without classifier."""
    check_images(x)
    x = square_conv(self.stem_width, 3, dtype=self.dtype, name='conv1')(x)
    block = nn.remat(ShakeShakeBlock, static_argnums=(2,)) if self.remat else ShakeShakeBlock
    for stage, size in enumerate(self.stage_sizes):
      for index in range(size):
        stride = 2 if stage and index == 0 else 1
        options = {'dtype': self.dtype, 'name': f'layer{stage + 1}_{index}'}
        x = block(self.widths[stage], stride, self.norm_groups, **options)(x, train)
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
