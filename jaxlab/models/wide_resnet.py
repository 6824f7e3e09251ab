"""Wide residual networks (Zagoruyko & Komodakis 2016, arXiv 1605.07146) as few-shot learning uses them.

Modules are named as in the code of S2M2 (Mangla et al. 2020): `block3.layer.0.conv1` is
`block3/layer_0/conv1`.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.initializers import torch_default, torch_default_bias
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import BatchNorm
from jaxlab.models.resnet import check_images, square_conv

Array = jax.Array


def conv_by_matmul(
  x: Array,
  kernel: Array,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  **kwargs: Any,
) -> Array:
  """Returns the convolution of `x` as one matrix product with its patches (im2col).

  The signature is that of `lax.conv_general_dilated`, for the field `conv_general_dilated` of `nn.Conv`.
  On a CPU it is several times faster for small images inside of `lax.scan`, and under `jax.vmap` over the
  kernels, where a convolution becomes a grouped one.

  Args:
    x: `[batch, height, width, channels]`.
    kernel: `[kernel height, kernel width, channels, features]`.
    strides: of height and width.
    padding: zeros before and after, of height and width.
    **kwargs: what `nn.Conv` passes on besides; groups and dilations must be 1.

  Returns:
    `[batch, out_height, out_width, features]`.

  Raises:
    ValueError: for grouped or dilated convolutions.
  """
  dilations = (kwargs.get('lhs_dilation'), kwargs.get('rhs_dilation'))
  if kwargs.get('feature_group_count', 1) != 1 or any(set(d or (1,)) != {1} for d in dilations):
    raise ValueError('conv_by_matmul: groups and dilations other than 1 are not supported.')
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  rows, columns = (
    (size - taps) // stride + 1
    for size, taps, stride in zip(x.shape[1:3], kernel.shape[:2], strides, strict=True)
  )
  patches = [
    x[:, i : i + (rows - 1) * strides[0] + 1 : strides[0],
      j : j + (columns - 1) * strides[1] + 1 : strides[1]]
    for i in range(kernel.shape[0])
    for j in range(kernel.shape[1])
  ]  # fmt: skip
  patches = jnp.concatenate(patches, -1)
  # Two axes: XLA's CPU backend multiplies matrices of higher rank slowly.
  flat = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
  return flat.reshape(*patches.shape[:3], -1)


class PreActivationBlock(nn.Module):
  """BN, ReLU, 3x3 convolution (stride), BN, ReLU, dropout, 3x3 convolution, around a shortcut.

  Where the width changes, the shortcut is a 1x1 convolution (stride) of the *pre-activated* input
  `relu(bn1(x))`; else it is the raw input.

  Attributes:
    features: channels of the result.
    stride: of the block, height and width; other than 1 only where the width changes.
    dropout: probability of dropping an entry between the convolutions, in train mode (RNG `dropout`).
    conv: `conv(features, kernel_size, stride, name=...)` makes a convolution.
    norm: `norm(name=...)` makes a norm.
  """

  features: int
  stride: int = 1
  dropout: float = 0.0
  conv: Callable[..., nn.Module] = square_conv
  norm: Callable[..., nn.Module] = BatchNorm

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[batch, height, width, channels]` to `[batch, height/stride, width/stride, features]`."""
    y = HookPoint(name='relu1')(nn.relu(self.norm(name='bn1')(x, train)))
    if x.shape[-1] != self.features:
      x = self.conv(self.features, 1, self.stride, name='convShortcut')(y)
    elif self.stride != 1:
      raise ValueError(
        f'PreActivationBlock: {self.features} channels in and out leave no convolution to stride '
        f'{self.stride} in the shortcut; use stride 1 or another width.'
      )
    y = self.conv(self.features, 3, self.stride, name='conv1')(y)
    y = HookPoint(name='relu2')(nn.relu(self.norm(name='bn2')(y, train)))
    y = nn.Dropout(self.dropout, name='dropout')(y, deterministic=not train)
    return x + self.conv(self.features, 3, name='conv2')(y)


class _Stage(nn.Module):
  """`size` blocks `layer_0, layer_1, ...`, of which the first strides."""

  size: int
  stride: int
  block: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    for index in range(self.size):
      x = self.block(stride=self.stride if index == 0 else 1, name=f'layer_{index}')(x, train)
    return x


class WideResNet(nn.Module):
  """A wide residual network over float images `[batch, height, width, channels]`.

  Stages `conv1`, `block1`, `block2`, ..., `bn1` (with the final ReLU `relu`), global average `avgpool`, and
  the classifier `linear`. Convolutions have no bias and start normal with variance
  2 / (kernel area * features). The defaults are WRN-28-10 on features of 640 channels. Collections:
  `params`, `batch_stats`; train mode with dropout needs the RNG `dropout`.

  Attributes:
    stage_sizes: number of pre-activation blocks of each stage.
    widths: channels of each stage.
    strides: stride of each stage (surplus entries are ignored).
    stem_width: channels of `conv1`.
    final_norm: whether `bn1` and its ReLU stand behind the last block.
    dropout: probability of dropping an entry between a block's convolutions.
    num_classes: size of the classifier `linear`; None returns the pooled features.
    conv: `'direct'`, or `'matmul'` for `conv_by_matmul`; the same function, on a CPU faster in a loop.
    dtype: of the computation (parameters and statistics stay float32); None: as the input.
    remat: recompute each block's activations in the backward pass instead of storing them.

  Raises:
    ValueError: at construction, if a field is out of its range.
  """

  stage_sizes: Sequence[int] = (4, 4, 4)
  widths: Sequence[int] = (160, 320, 640)
  strides: Sequence[int] = (1, 2, 2)
  stem_width: int = 16
  final_norm: bool = True
  dropout: float = 0.0
  num_classes: int | None = None
  conv: str = 'direct'
  dtype: Any = None
  remat: bool = False

  def __post_init__(self):
    stages = len(self.stage_sizes)
    if len(self.widths) != stages or len(self.strides) < stages:
      raise ValueError(
        f'WideResNet: {stages} stages need as many widths and strides; got widths={self.widths}, '
        f'strides={self.strides}.'
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(f'WideResNet: dropout={self.dropout}, expected a number in [0, 1).')
    if self.conv not in ('direct', 'matmul'):
      raise ValueError(f"WideResNet: conv={self.conv!r} is none of ('direct', 'matmul').")
    if self.num_classes is not None and self.num_classes < 1:
      raise ValueError(
        f'WideResNet: num_classes={self.num_classes}; give None for pooled features.'
      )
    super().__post_init__()

  @property
  def stages(self) -> tuple[str, ...]:
    """The names of the parts of the backbone, in order: `('conv1', 'block1', ..., 'bn1')`."""
    blocks = (f'block{i + 1}' for i in range(len(self.stage_sizes)))
    return ('conv1', *blocks, *(('bn1',) if self.final_norm else ()))

  @nn.compact
  def __call__(
    self,
    x: Array,
    train: bool | Collection[str] = False,
    start: str | None = None,
    stop: str | None = None,
  ) -> Array:
    """Returns logits `[batch, num_classes]`, or features `[batch, channels]` without classifier.

    Args:
      x: float images, or with `start` what goes into that stage.
      train: whether to normalize by the batch's statistics, update the running ones, and drop; or the names
        of the stages that do so, while all others are in eval mode (fine-tuning of a few stages).
      start: the first stage to run.
      stop: the stage to stop before; what goes into it is returned.

    Raises:
      ValueError: for a name that is no stage, or images that are not NHWC floats.

    >>> model = WideResNet((1, 1), widths=(4, 8))
    >>> run = functools.partial(model.init_with_output, jax.random.key(0), stop='block2')
    >>> jax.eval_shape(run, jnp.ones((2, 8, 8, 3)))[0].shape
    (2, 8, 8, 4)
    """
    check_images(x)
    trained = () if isinstance(train, bool) else tuple(train)
    for name in (*trained, *(name for name in (start, stop) if name is not None)):
      if name not in self.stages:
        raise ValueError(f'WideResNet: {name!r} is no stage; stages: {", ".join(self.stages)}.')
    first = self.stages.index(start or 'conv1')
    last = self.stages.index(stop) if stop else len(self.stages)
    for stage in self.stages[first:last]:
      x = self._run(stage, x, train if isinstance(train, bool) else stage in trained)
    if stop is not None:
      return x
    x = HookPoint(name='avgpool')(jnp.mean(x, (1, 2)))
    if self.num_classes is None:
      return x
    bias_init = torch_default_bias(x.shape[-1])
    linear = nn.Dense(
      self.num_classes,
      kernel_init=torch_default,
      bias_init=bias_init,
      dtype=self.dtype,
      name='linear',
    )
    return linear(x)

  def _run(self, stage: str, x: Array, train: bool) -> Array:
    """Returns the output of one stage; called within the compact method, it makes the stage's modules."""
    options = {} if self.conv == 'direct' else {'conv_general_dilated': conv_by_matmul}
    conv = functools.partial(square_conv, dtype=self.dtype, **options)
    norm = functools.partial(BatchNorm, dtype=self.dtype)
    if stage == 'conv1':
      return conv(self.stem_width, 3, name='conv1')(x)
    if stage == 'bn1':
      return HookPoint(name='relu')(nn.relu(norm(name='bn1')(x, train)))
    index = self.stages.index(stage) - 1
    block = PreActivationBlock
    if self.remat:
      block = nn.remat(block, static_argnums=(2,))
    block = functools.partial(block, self.widths[index], dropout=self.dropout, conv=conv, norm=norm)
    return _Stage(self.stage_sizes[index], self.strides[index], block, name=stage)(x, train)
