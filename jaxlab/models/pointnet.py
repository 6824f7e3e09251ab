"""PointNet (Qi et al., CVPR 2017, arXiv 1612.00593): a network over sets of points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.initializers import torch_default, torch_default_bias
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import BatchNorm

Array = jax.Array


def _dense(features: int, x: Array, name: str, dtype: Any) -> Array:
  bias_init = torch_default_bias(x.shape[-1])
  return nn.Dense(features, kernel_init=torch_default, bias_init=bias_init, dtype=dtype, name=name)(
    x
  )


class SharedMLP(nn.Module):
  """Linear layers with batch norm and ReLU that see every point alone: `fc{i}`, `bn{i}`, `relu{i}`.

  `last_relu=False` leaves out the last ReLU.
  """

  features: Sequence[int]
  last_relu: bool = True
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[..., channels]` to `[..., features[-1]]`."""
    for index, features in enumerate(self.features):
      x = _dense(features, x, f'fc{index}', self.dtype)
      x = BatchNorm(dtype=self.dtype, name=f'bn{index}')(x, train)
      if self.last_relu or index + 1 < len(self.features):
        x = HookPoint(name=f'relu{index}')(nn.relu(x))
    return x


class Transform(nn.Module):
  """A square matrix for every cloud, near the identity: points under an MLP, their maximum, another MLP.

  Attributes:
    size: of the matrix.
    widths: channels of the points' layers.
    hidden: units of the layers behind the maximum.
    dtype: of the computation; None: as the input.
  """

  size: int
  widths: Sequence[int] = (64, 128, 1024)
  hidden: Sequence[int] = (512, 256)
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[batch, points, channels]` to `[batch, size, size]`."""
    x = SharedMLP(self.widths, dtype=self.dtype, name='points')(x, train)
    x = jnp.max(x, axis=1)
    x = SharedMLP(self.hidden, dtype=self.dtype, name='cloud')(x, train)
    x = _dense(self.size**2, x, 'fc', self.dtype).reshape(-1, self.size, self.size)
    return HookPoint(name='matrix')(x + jnp.eye(self.size, dtype=x.dtype))


class PointNet(nn.Module):
  """PointNet's classification network over clouds `[batch, points, channels]`, in any order of the points.

  `input_transform` turns the first three channels (coordinates), `mlp1` sees every point, `feature_transform`
  multiplies its outputs, `mlp2` (the last layer without ReLU), the maximum over the points `maxpool`; then
  `head`. Collections: `params`, `batch_stats`; with classifier the random stream `dropout` in training.

  Attributes:
    num_classes: size of the classifier; None returns the pooled features.
    widths: channels of `mlp1`, the others of `mlp2`: those behind the first.
    hidden: units of both transforms' layers behind the maximum, and of the head.
    dropout: of the head.
    dtype: of the computation; None: as the input.

  Raises:
    ValueError: when called, for inputs that are no clouds of at least three channels.
  """

  num_classes: int | None = None
  widths: Sequence[int] = (64, 128, 1024)
  hidden: Sequence[int] = (512, 256)
  dropout: float = 0.4
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns logits `[batch, num_classes]`; without classifier features, `[batch, widths[-1]]`."""
    if x.ndim != 3 or x.shape[-1] < 3 or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f'PointNet: inputs must be floats [batch, points, at least 3 channels], got {x.dtype} {x.shape}.'
      )

    def transform(x, size, name):
      return Transform(size, self.widths, self.hidden, self.dtype, name=name)(x, train)

    turned = x[..., :3] @ transform(x, 3, 'input_transform')
    x = jnp.concatenate([turned, x[..., 3:]], -1)
    x = SharedMLP(self.widths[:1], dtype=self.dtype, name='mlp1')(x, train)
    x = x @ transform(x, self.widths[0], 'feature_transform')
    x = SharedMLP(self.widths[1:], False, self.dtype, name='mlp2')(x, train)
    x = HookPoint(name='maxpool')(jnp.max(x, axis=1))
    if self.num_classes is None:
      return x
    head = PointNetHead(self.num_classes, self.hidden, self.dropout, self.dtype, name='head')
    return head(x, train)


class PointNetHead(nn.Module):
  """The classifier of PointNet: linear layers with batch norm and ReLU, dropout before the last norm.

  Layers `fc{i}`, `bn{i}`, `relu{i}`, and `fc`. In training it draws from the stream `dropout`.

  Attributes:
    num_classes: number of logits.
    hidden: units of the layers.
    dropout: share of the last hidden layer's outputs that is dropped, in front of its norm.
    dtype: of the computation; None: as the input.
  """

  num_classes: int
  hidden: Sequence[int] = (512, 256)
  dropout: float = 0.4
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[batch, channels]` to logits `[batch, num_classes]`."""
    for index, features in enumerate(self.hidden):
      x = _dense(features, x, f'fc{index}', self.dtype)
      if index + 1 == len(self.hidden):
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
      x = BatchNorm(dtype=self.dtype, name=f'bn{index}')(x, train)
      x = HookPoint(name=f'relu{index}')(nn.relu(x))
    return _dense(self.num_classes, x, 'fc', self.dtype)
