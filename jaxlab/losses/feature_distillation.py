"""Losses that make a student's features follow a teacher's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_not_negative
from jaxlab.losses.classification import cross_entropy


def feature_distillation_loss(
  student_features: ArrayLike, teacher_features: ArrayLike
) -> jax.Array:
  """Mean squared distance of the features of an example, `mean_d (student - sg(teacher))^2`.

  Args:
    student_features: `[..., channels]`: pooled, or a map.
    teacher_features: likewise; no gradient.

  Returns:
    `[...]`, float32 or wider.

  Raises:
    ValueError: if the shapes differ: bring the student's features to the teacher's by a linear layer.

  Examples:
    >>> feature_distillation_loss(jnp.array([[1.0, 3.0]]), jnp.array([[1.0, 1.0]])).tolist()
    [2.0]
  """
  shapes = jnp.shape(student_features), jnp.shape(teacher_features)
  if shapes[0] != shapes[1] or not shapes[0]:
    raise ValueError(
      f'student_features {shapes[0]} and teacher_features {shapes[1]} must be [..., channels] of one shape: '
      f'bring other channels to those of the teacher by a linear layer.'
    )
  student, teacher = accumulated(student_features, teacher_features)
  return jnp.mean(jnp.square(student - jax.lax.stop_gradient(teacher)), axis=-1)


def mimic_loss(
  student_map: ArrayLike, teacher_map: ArrayLike, *, pooled: bool = False
) -> jax.Array:
  """Mean squared distance of the maps that two networks pool: what a pruned network mimics.

    mean_hwc (student - sg(teacher))^2, or, pooled, mean_c (mean_hw student - sg(mean_hw teacher))^2

  Of the map each place says what is wrong; the pooled difference is the gradient of all places alike.

  Args:
    student_map: `[..., height, width, channels]`, e.g. what `models.feature_map` returns.
    teacher_map: likewise; no gradient.
    pooled: compare means over height and width.

  Returns:
    `[...]`, float32 or wider.

  Raises:
    ValueError: if the shapes differ, or are no maps: a network that is pruned in its last width or resolution
      cannot stand in front of the teacher's head.

  References:
    Wang et al., Compressing Models with Few Samples: Mimicking then Replacing, CVPR 2022
    (https://arxiv.org/abs/2201.02620), where the map is 0.5 to 2 points better than its mean.

  Examples:
    >>> student = jnp.array([[[1.0], [3.0]]])  # one row of two places
    >>> [float(mimic_loss(student, jnp.full_like(student, 2.0), pooled=p)) for p in (False, True)]
    [1.0, 0.0]
  """
  shapes = jnp.shape(student_map), jnp.shape(teacher_map)
  if shapes[0] != shapes[1] or len(shapes[0]) < 3:
    raise ValueError(
      f'student_map {shapes[0]} and teacher_map {shapes[1]} must be [..., height, width, channels] of one '
      f'shape: prune neither the width nor the resolution of what enters the head.'
    )
  if pooled:
    maps = accumulated(student_map, teacher_map)
    return feature_distillation_loss(*(jnp.mean(own, (-3, -2)) for own in maps))
  return jnp.mean(feature_distillation_loss(student_map, teacher_map), (-2, -1))


def qfd_loss(
  student_logits: ArrayLike,
  labels: ArrayLike,
  student_features: ArrayLike,
  teacher_features: ArrayLike,
  *,
  weight: ArrayLike = 0.5,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Cross-entropy and the distance to the teacher's quantized features, means over the batch.

    loss = mean(CE(student_logits, labels)) + weight mean((student_features - sg(teacher_features))^2)

  The student is quantized, but its features are not; those of the teacher, a float network, are
  (`quantizers.quantize_feature`). With the features of an ordinary teacher this is plain feature
  distillation.

  Args:
    student_logits: `[..., num_classes]`.
    labels: integers, `[...]`.
    student_features: `[..., channels]`, e.g. pooled.
    teacher_features: likewise, of the frozen teacher on the same augmented images; no gradient.
    weight: not negative.

  Returns:
    The scalar loss, float32 or wider, and a dict of its terms before they are weighted, `cross_entropy` and
    `feature_distillation`.

  Raises:
    ValueError: if the shapes do not fit, or values are (where concrete) out of range.

  References:
    Zhu et al., Quantized Feature Distillation for Network Quantization, AAAI 2023
    (https://arxiv.org/abs/2307.10638). That the distance is a plain mean is inferred.
  """
  require_not_negative(weight=weight)
  terms = {
    'cross_entropy': jnp.mean(cross_entropy(student_logits, labels)),
    'feature_distillation': jnp.mean(feature_distillation_loss(student_features, teacher_features)),
  }
  return terms['cross_entropy'] + weight * terms['feature_distillation'], terms
