"""Classifiers over pooled features for few and imbalanced labels, and the network that ends in one."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from jaxlab.models.heads import unit
from jaxlab.models.initializers import Initializer, torch_default, torch_default_bias

Array = jax.Array

# Uniform within +-1/sqrt(features) over [classes, features].
_rows = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform', in_axis=-1, out_axis=-2)


class NormedLinear(nn.Module):
  """Cosines of features and class directions, `x / |x| @ W / |W|`, norms bounded below by 1e-12.

  The classifier of LDAM (Cao et al. 2019). Parameter `kernel` `[features, num_classes]`, normalized over
  the features; it starts on the unit sphere.

  Attributes:
    num_classes: number of cosines.
    dtype: of the computation; None: as the input.
  """

  num_classes: int
  dtype: Any = None

  def __post_init__(self):
    _require_classes('NormedLinear', self.num_classes)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[..., features]` to cosines `[..., num_classes]`."""
    kernel = self.param('kernel', _unit_columns, (x.shape[-1], self.num_classes), jnp.float32)
    x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
    return unit(x, -1) @ unit(kernel, 0)


class Linear(nn.Module):
  """`x @ kernel + bias`, by default drawn as PyTorch's; `LearnableWeightScaling` has the same parameters.

  Attributes:
    num_classes: number of logits.
    kernel_init: initializer of the kernel; default: PyTorch's.
    dtype: of the computation; None: as the input.
    bias_init: initializer of the bias; None: PyTorch's.
  """

  num_classes: int
  kernel_init: Initializer = torch_default
  dtype: Any = None
  bias_init: Initializer | None = None

  def __post_init__(self):
    _require_classes('Linear', self.num_classes)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[..., features]` to logits `[..., num_classes]`."""
    kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.num_classes), jnp.float32)
    bias_init = self.bias_init or torch_default_bias(x.shape[-1])
    bias = self.param('bias', bias_init, (self.num_classes,), jnp.float32)
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    return x @ kernel + bias


class AdaptedLinear(nn.Module):
  """Two linear layers without anything between: features are brought to `width` dimensions, then to classes.

  The first, `feat_fc`, lets a network's features follow those of another width; behind the training the two
  are one layer (`losses.merge_linear`). The second is `fc`. Both start as PyTorch's.

  Attributes:
    width: dimensions between the layers.
    num_classes: number of logits.
    dtype: of the computation; None: as the input.
  """

  width: int
  num_classes: int
  dtype: Any = None

  def __post_init__(self):
    _require_classes('AdaptedLinear', self.num_classes)
    if self.width < 1:
      raise ValueError(f'AdaptedLinear: width={self.width} must be positive.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[..., features]` to logits `[..., num_classes]`."""
    x = Linear(self.width, dtype=self.dtype, name='feat_fc')(x)
    return Linear(self.num_classes, dtype=self.dtype, name='fc')(x)


class LearnableWeightScaling(nn.Module):
  """A linear classifier with one factor a class, `scale * (x @ kernel + bias)`; factors start at 1.

  Decoupling's LWS (Kang et al. 2020) trains `scale` alone over a frozen `kernel` and `bias`; MiSLAS
  (Zhong et al. 2021) trains all three, the factors with a learning rate of their own.

  Attributes:
    num_classes: number of logits.
    dtype: of the computation; None: as the input.
  """

  num_classes: int
  dtype: Any = None

  def __post_init__(self):
    _require_classes('LearnableWeightScaling', self.num_classes)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[..., features]` to logits `[..., num_classes]`."""
    shape = (x.shape[-1], self.num_classes)
    kernel = self.param('kernel', torch_default, shape, jnp.float32)
    bias = self.param('bias', torch_default_bias(shape[0]), shape[1:], jnp.float32)
    scale = self.param('scale', nn.initializers.ones, shape[1:], jnp.float32)
    x, kernel, bias, scale = nn.dtypes.promote_dtype(x, kernel, bias, scale, dtype=self.dtype)
    return scale * (x @ kernel + bias)


class WeightNormHead(nn.Module):
  """Weight-normalized classifier over normalized features.

  `logits_c = scale * x / (|x| + eps) . (g_c v_c / |v_c|)`, without bias; the learned lengths `g` leave the
  logits unbounded. Parameters `v` `[num_classes, features]`, uniform within +-1/sqrt(features), and `g`
  `[num_classes, 1]`, which starts as the norms of `v`. ACSR (Fu et al. 2022) has `scale=2, eps=1e-6`, IbM2
  (Fu et al. 2024) `scale=10, eps=1e-5`. A zero feature gets logits 0.

  Attributes:
    num_classes: number of logits.
    scale: factor of all logits.
    eps: added to the features' norms.
    dtype: of the computation; None: as the input.
  """

  num_classes: int
  scale: float = 2.0
  eps: float = 1e-6
  dtype: Any = None

  def __post_init__(self):
    _require_classes('WeightNormHead', self.num_classes)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[..., features]` to logits `[..., num_classes]`."""
    v = self.param('v', _rows, (self.num_classes, x.shape[-1]), jnp.float32)
    g = self.param('g', lambda key, shape: _norm(v, -1), (self.num_classes, 1))
    x, v, g = nn.dtypes.promote_dtype(x, v, g, dtype=self.dtype)
    weight = unit(v, -1) * g
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    short = (wide / (_norm(wide, -1) + self.eps)).astype(x.dtype)
    return self.scale * (short @ weight.T)


class Classifier(nn.Module):
  """Returns `head(backbone(images))`; its children are named `backbone` and `head`.

  Another head takes the backbone's parameters along as the subtree `backbone`, so that stages which
  retrain the classifier exchange nothing else.

  Attributes:
    backbone: a network that returns pooled features, e.g. `create('resnet50', num_classes=None)`.
    head: a module `features -> logits`, e.g. `LearnableWeightScaling(1000)` or `nn.Dense(1000)`; one whose
      call takes `train` is told.
  """

  backbone: nn.Module
  head: nn.Module

  def __call__(self, images: Array, train: bool = False) -> Array:
    """Returns logits `[batch, num_classes]` of the backbone's inputs."""
    features = self.features(images, train)
    if 'train' in inspect.signature(type(self.head).__call__).parameters:
      return self.head(features, train)
    return self.head(features)

  def features(self, images: Array, train: bool = False) -> Array:
    """Returns the backbone's features `[batch, features]` (`apply(..., method='features')`)."""
    return self.backbone(images, train=train)


def tau_normalize(kernel: ArrayLike, tau: ArrayLike) -> Array:
  """Returns a classifier's kernel with its class weights' lengths evened: `w_c / |w_c|^tau`.

  Classes with many images have grown longer weights; `tau` is searched in 0, 0.1, ..., 2 on validation
  images and the bias is dropped (Kang et al. 2020, section 4.1).

  Args:
    kernel: `[features, num_classes]`; a column of zeros stays as it is.
    tau: exponent, a scalar; 0 leaves the kernel, 1 makes all weights unit vectors.

  Raises:
    ValueError: unless `kernel` is a matrix.

  >>> tau_normalize(jnp.array([[3.0, 0.0], [4.0, 2.0]]), 1.0)
  Array([[0.6, 0. ],
         [0.8, 1. ]], dtype=float32)
  """
  kernel = jnp.asarray(kernel)
  if kernel.ndim != 2:
    raise ValueError(
      f'tau_normalize: kernel must be [features, num_classes], got shape {kernel.shape}.'
    )
  wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
  return (wide / _norm(wide, 0) ** tau).astype(kernel.dtype)


def nearest_class_mean(features: ArrayLike, labels: ArrayLike, num_classes: int) -> Array:
  """Returns the unit mean of each class's unit features, a kernel `[features, num_classes]`.

  Cosine classification by class means (Kang et al. 2020): `argmax(features @ kernel)`. The predicted
  class does not depend on the length of the feature that is classified.

  Args:
    features: `[examples, dim]`; normalized here.
    labels: integers `[examples]`.
    num_classes: number of classes; one without examples gets zeros, hence cosine 0.

  Raises:
    ValueError: if shapes do not fit.
  """
  features, labels = jnp.asarray(features), jnp.asarray(labels)
  if features.ndim != 2 or labels.shape != features.shape[:1]:
    raise ValueError(
      f'nearest_class_mean: features must be [examples, dim] and labels [examples], got '
      f'{features.shape} and {labels.shape}.'
    )
  _require_classes('nearest_class_mean', num_classes)
  wide = features.astype(jnp.promote_types(features.dtype, jnp.float32))
  # The sum points where the mean does.
  sums = jax.ops.segment_sum(unit(wide, -1), labels, num_classes)
  return unit(sums, -1).T.astype(features.dtype)


def _require_classes(name: str, num_classes: int) -> None:
  if num_classes < 1:
    raise ValueError(f'{name}: num_classes={num_classes} must be positive.')


def _norm(x: Array, axis: int) -> Array:
  """Returns the norm along `axis` (kept), at least 1e-12, in at least float32; its gradient at 0 is 0."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return jnp.sqrt(jnp.maximum(jnp.sum(wide * wide, axis, keepdims=True), 1e-24))


def _unit_columns(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
  """Draws the initial directions of LDAM's classifier: uniform in a cube, brought to unit length."""
  return unit(jax.random.uniform(key, shape, dtype, -1, 1), 0)
