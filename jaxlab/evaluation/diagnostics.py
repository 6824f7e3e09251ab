"""What features look like: spread, agreement of two feature sets, and number of used dimensions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.evaluation._arguments import require_features
from jaxlab.losses import normalize


def feature_std(features: ArrayLike) -> jax.Array:
  """Collapse statistic: standard deviation of unit-length features, averaged over dimensions, x sqrt(dim).

  About 1 for features spread evenly over the sphere, 0 if all inputs have one feature.

  Args:
    features: `[examples, dim]`.

  Returns:
    A scalar in [0, 1], float32 or wider. The deviation is the population's (divided by the count).

  References:
    Chen & He, Exploring Simple Siamese Representation Learning, CVPR 2021, figure 2
    (https://arxiv.org/abs/2011.10566), times sqrt(dim).
  """
  require_features('features', features)
  features = normalize(_wide(features))
  return jnp.mean(jnp.std(features, axis=0)) * jnp.sqrt(features.shape[1])


def mean_cosine(a: ArrayLike, b: ArrayLike, *, centered: bool = False) -> jax.Array:
  """Mean cosine between corresponding rows of two feature sets.

  Args:
    a: `[examples, dim]`.
    b: `[examples, dim]`, other features of the same inputs.
    centered: subtract each set's mean feature first. Features behind a ReLU have large plain cosines
      whatever they encode.

  Returns:
    A scalar in [-1, 1], float32 or wider.

  Raises:
    ValueError: if the shapes differ.
  """
  require_features('a', a)
  if jnp.shape(a) != jnp.shape(b):
    raise ValueError(f'Expected feature sets of one shape, got {jnp.shape(a)} and {jnp.shape(b)}.')
  a, b = _wide(a), _wide(b)
  if centered:
    a, b = a - jnp.mean(a, axis=0), b - jnp.mean(b, axis=0)
  return jnp.mean(jnp.sum(normalize(a) * normalize(b), axis=-1))


def norm_ratios(a: ArrayLike, b: ArrayLike) -> jax.Array:
  """How long the rows of one feature set are, each over that of another: `|a_i| / |b_i|`.

  Args:
    a: `[examples, dim]`.
    b: `[examples, dim]`, other features of the same inputs; the norm of a row of zeros counts as 1e-12.

  Returns:
    `[examples]`, float32 or wider.

  Raises:
    ValueError: if the numbers of examples differ.

  Examples:
    >>> norm_ratios(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 2.0]])).tolist()
    [2.5]
  """
  require_features('a', a)
  require_features('b', b)
  if len(jnp.asarray(a)) != len(jnp.asarray(b)):
    raise ValueError(
      f'Expected features of as many examples, got {jnp.shape(a)} and {jnp.shape(b)}.'
    )
  lengths = [jnp.linalg.norm(_wide(own), axis=-1) for own in (a, b)]
  return lengths[0] / jnp.maximum(lengths[1], 1e-12)


def effective_rank(features: ArrayLike, *, centered: bool = True) -> jax.Array:
  """Number of dimensions that features use: the exponential of the entropy of their singular values.

    exp(-sum_i p_i log p_i),  p_i = s_i / sum(s)

  Args:
    features: `[examples, dim]`.
    centered: subtract the mean feature first.

  Returns:
    A scalar between 1 and `min(examples, dim)`, float32 or wider; 1 for features that are all equal.

  References:
    Roy & Vetterli, The Effective Rank: A Measure of Effective Dimensionality, EUSIPCO 2007.
  """
  require_features('features', features)
  features = _wide(features)
  if centered:
    features = features - jnp.mean(features, axis=0)
  values = jnp.linalg.svd(features, compute_uv=False)
  total = jnp.sum(values)
  shares = values / jnp.where(total > 0, total, 1)
  return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(shares, shares)))


def _wide(features: ArrayLike) -> jax.Array:
  return jnp.asarray(features).astype(jnp.promote_types(jnp.result_type(features), jnp.float32))
