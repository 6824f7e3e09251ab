"""A classifier that sees features in given coordinates, of which some are gated off."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from jaxlab.models.classifier_heads import Linear

Array = jax.Array


class CoordinateHead(nn.Module):
  """Features along the axes of a coordinate system, times a gate for each axis, under a linear classifier.

    u = features, or feat_fc(features);  z = (u - mean) V;  logits = fc(z * mask)

  `mean` and `components` (V) are in the collection `coordinates`, which starts with zeros, no parameters.
  `mask` is a parameter, so that it has a gradient; what changes it is its optimizer's matter
  (`training.select_gates`). Behind the training all is one linear layer, see `merge_coordinates`.

  Attributes:
    num_classes: number of logits.
    dim: of the coordinate system's space.
    count: of its axes.
    adapted: whether a linear layer `feat_fc` brings features to `dim`; else they must have that many.
    dtype: of the computation; None: as the input.

  References:
    Zhou, Zhu & Wu, All You Need in Knowledge Distillation Is a Tailored Coordinate System, AAAI 2025
    (https://arxiv.org/abs/2412.09388). The layer `feat_fc` is inferred.
  """

  num_classes: int
  dim: int
  count: int
  adapted: bool = True
  dtype: Any = None

  def __post_init__(self):
    if self.num_classes < 1 or not 1 <= self.count <= self.dim:
      raise ValueError(
        f'CoordinateHead: num_classes={self.num_classes} must be positive, count={self.count} 1 to '
        f'dim={self.dim}.'
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[..., features]` to logits `[..., num_classes]`."""
    if self.adapted:
      x = Linear(self.dim, dtype=self.dtype, name='feat_fc')(x)
    elif x.shape[-1] != self.dim:
      raise ValueError(
        f'CoordinateHead: features {x.shape} have not dim={self.dim}; bring them there by adapted=True.'
      )
    mean = self.variable('coordinates', 'mean', jnp.zeros, (self.dim,))
    axes = self.variable('coordinates', 'components', jnp.zeros, (self.dim, self.count))
    mask = self.param('mask', nn.initializers.ones, (self.count,), jnp.float32)
    x = coordinates(x, mean.value, axes.value) * mask
    return Linear(self.num_classes, dtype=self.dtype, name='fc')(x)


def coordinates(features: ArrayLike, mean: ArrayLike, components: ArrayLike) -> Array:
  """Returns features along axes, `(features - mean) V`.

  Args:
    features: `[..., dim]`.
    mean: `[dim]`, the origin.
    components: V, `[dim, count]`.

  Raises:
    ValueError: if shapes do not fit.

  >>> coordinates(jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0]), jnp.eye(2)[:, :1]).tolist()
  [2.0]
  """
  shapes = [jnp.shape(own) for own in (features, mean, components)]
  if len(shapes[2]) != 2 or shapes[1] != shapes[2][:1] or shapes[0][-1:] != shapes[1]:
    raise ValueError(
      f'coordinates: expected features [..., dim], mean [dim] and components [dim, count], got {shapes}.'
    )
  return jnp.matmul(jnp.asarray(features) - mean, components, precision='highest')


def merge_coordinates(
  mean: ArrayLike,
  components: ArrayLike,
  mask: ArrayLike,
  kernel: ArrayLike,
  bias: ArrayLike,
  adapter: tuple[ArrayLike, ArrayLike] | None = None,
) -> tuple[Array, Array]:
  """Returns kernel and bias of a `CoordinateHead` as one linear layer.

    W = A V diag(mask) kernel;  b = ((a - mean) V * mask) kernel + bias

  Args:
    mean: `[dim]`.
    components: V, `[dim, count]`.
    mask: `[count]`.
    kernel: of `fc`, `[count, num_classes]`.
    bias: of `fc`, `[num_classes]`.
    adapter: A `[features, dim]` and a `[dim]` of `feat_fc`; None: there is none.

  Raises:
    ValueError: if shapes do not fit.
  """
  shapes = jnp.shape(components), jnp.shape(mask), jnp.shape(kernel)
  if shapes[0][1:] != shapes[1] or shapes[1] != shapes[2][:1] or len(shapes[2]) != 2:
    raise ValueError(
      f'merge_coordinates: components {shapes[0]}, mask {shapes[1]} and kernel {shapes[2]} do not chain.'
    )
  axes = jnp.asarray(components) * jnp.asarray(mask)
  whole = jnp.matmul(axes, kernel, precision='highest')
  if adapter is None:
    return whole, bias - jnp.matmul(mean, whole, precision='highest')
  first, origin = (jnp.asarray(own) for own in adapter)
  shift = jnp.matmul(origin - mean, whole, precision='highest')
  return jnp.matmul(first, whole, precision='highest'), shift + bias
