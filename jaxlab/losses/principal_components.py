"""Mimicking of features within the directions in which they vary most."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated


class PrincipalComponents(NamedTuple):
  """What features vary in.

  Attributes:
    mean: `[dim]`.
    components: `[dim, count]`, orthonormal columns, by falling variance.
    variance: along all dim components, `[dim]`, divided by `examples - 1`.
  """

  mean: jax.Array
  components: jax.Array
  variance: jax.Array


def fit_principal_components(
  features: ArrayLike, count: int | None = None, *, share: float = 0.6, multiple: int = 32
) -> PrincipalComponents:
  """Returns the first principal components of features.

  Args:
    features: `[examples, dim]`, e.g. of the teacher on some thousand training images.
    count: of the components; None: `num_components(variance, share, multiple)`, which looks at the values.
    share: see `num_components`.
    multiple: see `num_components`.

  Raises:
    ValueError: for anything but a matrix of two examples or more, a count that exceeds dimensions or
      examples, or (where concrete) features that are not finite.

  Warns:
    RuntimeWarning: if (where concrete) the features span fewer dimensions than the count.
  """
  shape = jnp.shape(features)
  if len(shape) != 2 or shape[0] < 2 or not shape[1]:
    raise ValueError(f'features must be [examples, dim] of two examples or more, got {shape}.')
  (features,) = accumulated(features)
  mean = jnp.mean(features, axis=0)
  centered = features - mean
  covariance = jnp.matmul(centered.T, centered, precision=jax.lax.Precision.HIGHEST)
  values, vectors = jnp.linalg.eigh(covariance / (shape[0] - 1))
  variance, vectors = jnp.maximum(values[::-1], 0), vectors[:, ::-1]
  concrete = not isinstance(variance, jax.core.Tracer)
  if concrete and not np.all(np.isfinite(variance)):
    raise ValueError('features must be finite.')
  if count is None:
    count = num_components(variance, share, multiple)
  if not 1 <= count <= min(shape):
    raise ValueError(
      f'count={count} components must be at least 1 and at most the number of dimensions and of examples, '
      f'{shape[::-1]}.'
    )
  if concrete:
    floor = float(variance[0]) * max(shape) * float(jnp.finfo(variance.dtype).eps)
    rank = int(np.sum(np.asarray(variance) > floor))
    if rank < count:
      warnings.warn(
        f'The features span {rank} dimensions: of {count} components {count - rank} are arbitrary.',
        RuntimeWarning,
        stacklevel=2,
      )
  return PrincipalComponents(mean, vectors[:, :count], variance)


def coordinate_system(features: ArrayLike, count: int | None = None) -> PrincipalComponents:
  """Returns the principal components of features as axes that are the same wherever they are computed.

  In float64 on the host, with signs by a rule: the entry of largest magnitude of each axis is positive. Of
  fewer examples than dimensions there are `examples - 1` axes; those without variance are left out.

  Args:
    features: `[examples, dim]` of a teacher, concrete.
    count: of the axes, the first ones; None: all.

  Returns:
    NumPy arrays in float64: `mean` `[dim]`, `components` `[dim, count]`, and `variance` along all axes that
    there are.

  Raises:
    ValueError: for anything but a matrix of two examples or more, features that are not finite or all equal,
      or a count that exceeds the axes.

  References:
    Zhou, Zhu & Wu, All You Need in Knowledge Distillation Is a Tailored Coordinate System, AAAI 2025
    (https://arxiv.org/abs/2412.09388).

  Examples:
    >>> found = coordinate_system(np.array([[0.0, 1.0], [0.0, 3.0], [0.0, 5.0]]))
    >>> found.mean.tolist(), found.components.tolist(), found.variance.tolist()
    ([0.0, 3.0], [[0.0], [1.0]], [4.0])
  """
  features = np.asarray(features, np.float64)
  shape = features.shape
  if len(shape) != 2 or shape[0] < 2 or not shape[1]:
    raise ValueError(f'features must be [examples, dim] of two examples or more, got {shape}.')
  if wrong := np.flatnonzero(~np.isfinite(features).all(1)).tolist():
    raise ValueError(f'features: {len(wrong)} rows are not finite, the first is row {wrong[0]}.')
  mean = features.mean(0)
  centered = features - mean
  if shape[0] > shape[1]:
    values, vectors = np.linalg.eigh(centered.T @ centered / (shape[0] - 1))
    values, vectors = values[::-1], vectors[:, ::-1]
  else:
    _, lengths, rows = np.linalg.svd(centered, full_matrices=False)
    values, vectors = lengths**2 / (shape[0] - 1), rows.T
  there = min(shape[1], shape[0] - 1)
  # What varies by rounding alone is no axis; float32 features round by more than float64 computes.
  there = min(there, int(np.sum(values > values[0] * max(shape) * np.finfo(np.float64).eps)))
  if not values[0] > 0:
    raise ValueError(f'features are the same in all {shape[0]} rows.')
  if count is not None and not 1 <= count <= there:
    raise ValueError(
      f'count={count}: {shape[0]} features of {shape[1]} dimensions have 1 to {there} axes.'
    )
  vectors = vectors[:, :there]
  largest = vectors[np.abs(vectors).argmax(0), np.arange(there)]
  return PrincipalComponents(mean, (vectors * np.sign(largest))[:, :count], values[:there])


def num_components(variance: ArrayLike, share: float = 0.6, multiple: int = 32) -> int:
  """How many components explain a share of the variance, rounded up to a multiple, at most all.

  768 features of a Swin-T with multiple 32 gave 256. Networks below 64 dimensions want a smaller multiple, 8.

  Args:
    variance: `[dim]`, falling; concrete.
    share: in (0, 1].
    multiple: positive.

  Raises:
    ValueError: for values out of range, or variances that are all 0.

  References:
    Liang et al., NeurIPS 2025, as `pca_mimicking_loss`.

  Examples:
    >>> num_components([4.0, 3.0, 2.0, 1.0], multiple=1), num_components([4.0, 3.0, 2.0, 1.0])
    (2, 4)
  """
  variance = np.asarray(variance, np.float64)
  if variance.ndim != 1 or not np.all(variance >= 0) or not variance.sum() > 0:
    raise ValueError('variance must be [dim], not negative and not all 0.')
  if not 0 < share <= 1:
    raise ValueError(f'share must be in (0, 1], got {share}.')
  if not multiple >= 1:
    raise ValueError(f'multiple must be positive, got {multiple}.')
  explained = np.cumsum(variance) / variance.sum()
  # A share of 1 is reached by rounding.
  needed = int(np.sum(explained < share - 1e-9)) + 1
  return min(math.ceil(needed / multiple) * multiple, len(variance))


def pca_mimicking_loss(
  student_features: ArrayLike,
  teacher_features: ArrayLike,
  mean: ArrayLike,
  components: ArrayLike,
) -> jax.Array:
  """Squared distance of the features of an example within the principal subspace of the teacher's.

    loss = |(student - mean) V - (teacher - mean) V|^2, summed over the components

  The mean cancels out; it is part of the definition. Its weight in GPLQ is 1.

  Args:
    student_features: `[..., dim]`, the penultimate ones.
    teacher_features: likewise, of the frozen float network; no gradient.
    mean: `[dim]`, as the next from `fit_principal_components`; no gradient.
    components: V, `[dim, count]`; no gradient.

  Returns:
    `[...]`, float32 or wider.

  Raises:
    ValueError: if the shapes do not fit.

  References:
    Liang et al., GPLQ: A General, Practical, and Lightning QAT Method for Vision Transformers, NeurIPS 2025
    (https://arxiv.org/abs/2506.11784), equation 2.
  """
  arrays = student_features, teacher_features, mean, components
  shapes = [jnp.shape(array) for array in arrays]
  student, teacher, center, basis = shapes
  if not student or student != teacher or center != student[-1:] or len(basis) != 2:
    fits = False
  else:
    fits = basis[0] == student[-1]
  if not fits:
    raise ValueError(
      f'Expected student and teacher features [..., dim], mean [dim] and components [dim, count]; got '
      f'{", ".join(map(str, shapes))}.'
    )
  student, teacher, mean, components = accumulated(*arrays)
  teacher, mean, components = map(jax.lax.stop_gradient, (teacher, mean, components))

  def project(features: jax.Array) -> jax.Array:
    return jnp.matmul(features - mean, components, precision=jax.lax.Precision.HIGHEST)

  return jnp.sum(jnp.square(project(student) - project(teacher)), axis=-1)
