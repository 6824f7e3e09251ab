"""Second-order pooling: a map of features by the covariance of its channels, and a classifier on it.

iSQRT-COV (Li et al., CVPR 2018, arXiv 1712.01034) takes the matrix square root of the covariance by a few
Newton-Schulz iterations: products of matrices alone, no eigenvalues, on any accelerator. Gradients are those
of the iterations as they are.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike

from jaxlab.models.bilinear import bilinear_pool, compact_bilinear, draw_sketches, wide_map
from jaxlab.models.classifier_heads import Linear, NormedLinear
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import BatchNorm
from jaxlab.models.resnet import square_conv

Array = jax.Array

POOLINGS = ('mean', 'bilinear', 'compact_bilinear', 'isqrt_cov')


def covariance_pool(x: Array) -> Array:
  """Covariance of channels over positions, `S = 1/M sum_m (x_m - mean)(x_m - mean)^T`; the divisor is M.

  Args:
    x: floats `[batch, height, width, channels]`, M = height width.

  Returns:
    `[batch, channels, channels]`, float32 or wider; of a single position zeros.

  Raises:
    ValueError: for other shapes, or integers.

  References:
    Li et al., Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix Square Root
    Normalization, CVPR 2018, equation 1 (https://arxiv.org/abs/1712.01034).

  >>> covariance_pool(jnp.array([[[[1.0, 0.0]], [[3.0, 2.0]]]])).tolist()
  [[[1.0, 1.0], [1.0, 1.0]]]
  """
  x = wide_map(x)
  x = x.reshape(len(x), -1, x.shape[-1])
  x = x - jnp.mean(x, 1, keepdims=True)
  return jnp.einsum('bmi,bmj->bij', x, x, precision='highest') / x.shape[1]


def newton_schulz_sqrt(s: Array, iterations: int = 5, eps: float = 1e-12) -> Array:
  """Square roots of symmetric positive semi-definite matrices by coupled Newton-Schulz iterations.

  The trace brings the eigenvalues into (0, 1], where the iteration converges; what it took is given back:

    A = S / tr(S);  Y_0 = A, Z_0 = I
    T = (3 I - Z_{k-1} Y_{k-1}) / 2;  Y_k = Y_{k-1} T;  Z_k = T Z_{k-1}
    C = sqrt(tr(S)) Y_n

  Small eigenvalues take longest: of n matrices the mean one is 1/n behind the trace, so that five iterations
  are within 1 % up to 8 channels, and far from the root, on purpose, at 256.

  Args:
    s: floats `[..., n, n]`.
    iterations: at least 1; static.
    eps: a trace up to it (that of a constant map) gives zeros, with gradient 0.

  Returns:
    `[..., n, n]`, float32 or wider.

  Raises:
    ValueError: for other shapes, integers, or fewer iterations.

  References:
    Li et al., CVPR 2018, equations 2 to 5 (https://arxiv.org/abs/1712.01034).

  >>> root = newton_schulz_sqrt(jnp.array([[4.0, 0.0], [0.0, 9.0]]), 8)
  >>> [[round(float(value), 3) for value in row] for row in root]
  [[2.0, 0.0], [0.0, 3.0]]
  """
  s = _matrices(s)
  if iterations < 1:
    raise ValueError(f'iterations={iterations}: expected at least 1.')
  s = s.astype(jnp.promote_types(s.dtype, jnp.float32))
  trace = jnp.trace(s, axis1=-2, axis2=-1)[..., None, None]
  some = trace > eps
  # Gradients reach the untaken branch too: nothing may be infinite there.
  safe = jnp.where(some, trace, 1)
  product = lambda a, b: jnp.matmul(a, b, precision='highest')  # noqa: E731
  identity = jnp.eye(s.shape[-1], dtype=s.dtype)
  y, z = s / safe, None
  for last in [False] * (iterations - 1) + [True]:
    t = (3 * identity - (y if z is None else product(z, y))) / 2
    if not last:
      z = t if z is None else product(t, z)
    y = product(y, t)
  return jnp.where(some, jnp.sqrt(safe) * y, 0)


def upper_triangle(s: Array) -> Array:
  """Returns the entries of `[..., n, n]` on and above the diagonal, row by row, `[..., n (n + 1) / 2]`.

  Raises:
    ValueError: for other shapes, or integers.

  >>> upper_triangle(jnp.array([[1.0, 2.0], [2.0, 3.0]])).tolist()
  [1.0, 2.0, 3.0]
  """
  s = _matrices(s)
  rows, columns = np.triu_indices(s.shape[-1])
  return s[..., rows, columns]


def isqrt_cov(x: Array, iterations: int = 5, eps: float = 1e-12) -> Array:
  """iSQRT-COV pooling: the upper triangle of the root of the covariance, not normalized further.

  `upper_triangle(newton_schulz_sqrt(covariance_pool(x), iterations))`.

  Args:
    x: floats `[batch, height, width, channels]`.
    iterations: of the root, 5 in the paper's networks; static.
    eps: see `newton_schulz_sqrt`.

  Returns:
    `[batch, channels (channels + 1) / 2]`, float32 or wider.

  Raises:
    ValueError: for other shapes, integers, or no iteration.

  References:
    Li et al., CVPR 2018 (https://arxiv.org/abs/1712.01034); among the methods of Wei et al., Fine-Grained
    Image Analysis with Deep Learning: A Survey, TPAMI 2022 (https://arxiv.org/abs/2111.06119).

  >>> x = jnp.array([[[[1.0, 0.0]], [[3.0, 0.0]]]])
  >>> isqrt_cov(x).tolist()
  [[1.0, 0.0, 0.0]]
  """
  return upper_triangle(newton_schulz_sqrt(covariance_pool(x), iterations, eps))


class SecondOrderHead(nn.Module):
  """A classifier on second-order statistics of a map of features; under `MapClassifier` of any network.

  `fc(pool(relu(bn(reduce(map)))))`: a 1x1 convolution `reduce` without bias and batch norm `bn`, both only
  with a `reduction`, hook point `map` behind them, hook point `pool` behind the pooling, classifier `fc`.

  Attributes:
    num_classes: number of logits; None returns the pooled vector, the embedding of retrieval.
    pooling: 'mean' (global average pooling), 'bilinear' (signed, `eps=1e-8`), 'compact_bilinear' or
      'isqrt_cov'.
    reduction: channels that the map is reduced to; None: it is not.
    iterations: of 'isqrt_cov'.
    sketch_dim: of 'compact_bilinear'.
    sketch_seed: of what it sketches with.
    cosine: whether the classifier is a `NormedLinear`, of cosines in place of products.
    norm_groups: groups of the batch with separate statistics, see `BatchNorm`.
    dtype: of convolution and classifier; None: as the input. Statistics are in float32 or wider.

  Raises:
    ValueError: at construction, if a field is out of its range.
  """

  num_classes: int | None
  pooling: Literal[POOLINGS] = 'isqrt_cov'
  reduction: int | None = None
  iterations: int = 5
  sketch_dim: int = 8192
  sketch_seed: int = 0
  cosine: bool = False
  norm_groups: int = 1
  dtype: Any = None

  def __post_init__(self):
    if self.pooling not in POOLINGS:
      raise ValueError(
        f'SecondOrderHead: pooling={self.pooling!r}, expected one of {", ".join(POOLINGS)}.'
      )
    for name in ('num_classes', 'reduction', 'iterations', 'sketch_dim'):
      if (value := getattr(self, name)) is not None and value < 1:
        raise ValueError(f'SecondOrderHead: {name}={value} must be positive.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[batch, height, width, channels]` to logits, or without classes to pooled vectors."""
    if self.reduction is not None:
      x = square_conv(self.reduction, 1, dtype=self.dtype, name='reduce')(x)
      x = nn.relu(BatchNorm(groups=self.norm_groups, dtype=self.dtype, name='bn')(x, train))
    x = HookPoint(name='map')(x)
    x = HookPoint(name='pool')(self._pooled(x))
    if self.num_classes is None:
      return x
    classifier = NormedLinear if self.cosine else Linear
    return classifier(self.num_classes, dtype=self.dtype, name='fc')(x)

  def _pooled(self, x: Array) -> Array:
    """Returns the pooled map."""
    if self.pooling == 'mean':
      return jnp.mean(x, (1, 2))
    if self.pooling == 'bilinear':
      return bilinear_pool(x, 1e-8, signed=True)
    if self.pooling == 'isqrt_cov':
      return isqrt_cov(x, self.iterations)
    sketches = draw_sketches(self.sketch_seed, x.shape[-1], self.sketch_dim)
    return compact_bilinear(x, *sketches, self.sketch_dim)


def _matrices(s: ArrayLike) -> Array:
  """Returns matrices; raises ValueError unless they are square, of floats."""
  shape = jnp.shape(s)
  if len(shape) < 2 or shape[-1] != shape[-2] or not shape[-1]:
    raise ValueError(f's must be square matrices [..., n, n], got {shape}.')
  if not jnp.issubdtype(jnp.result_type(s), jnp.floating):
    raise ValueError(f's must be floats, got {jnp.result_type(s)}.')
  return jnp.asarray(s)
