"""Losses that make two views of an image agree: without negatives, by distillation, by decorrelation.

Contrastive losses are in `contrastive`, masked-image losses in `reconstruction`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_positive, require_same_shape


def negative_cosine_similarity(
  prediction: ArrayLike, target: ArrayLike, *, bound_each: bool = False
) -> jax.Array:
  """Negative cosine of the angle between predictions and fixed targets.

    -sum(prediction * sg(target)) / max(|prediction| |sg(target)|, 1e-8)

  with sg the stop-gradient: no gradient flows into `target`. A zero vector has the value 0.

  Args:
    prediction: `[..., dim]`.
    target: `[..., dim]`.
    bound_each: bound each norm, `max(|p|, 1e-8) max(|t|, 1e-8)`, as PyTorch does since 1.12 (its pull
      request 31378), and not their product, as earlier ones and the methods' reference values do. The two
      differ where a norm is below 1e-8, or where the product is.

  Returns:
    Values in [-1, 1] of shape `[...]`, float32 or wider.

  Raises:
    ValueError: if the shapes differ.

  References:
    Chen & He, Exploring Simple Siamese Representation Learning, CVPR 2021, eq. 1
    (https://arxiv.org/abs/2011.10566); the bound of the denominator is PyTorch's.

  Examples:
    >>> negative_cosine_similarity(jnp.array([[2.0, 0.0]]), jnp.array([[0.5, 0.0]])).tolist()
    [-1.0]
  """
  require_same_shape(prediction=prediction, target=target)
  prediction, target = accumulated(prediction, target)
  target = jax.lax.stop_gradient(target)
  dot = jnp.sum(prediction * target, axis=-1)
  squares = jnp.sum(prediction**2, axis=-1), jnp.sum(target**2, axis=-1)
  if bound_each:
    bounded = (jax.lax.rsqrt(jnp.maximum(s, 1e-16)) for s in squares)
    return -dot * next(bounded) * next(bounded)
  squares = squares[0] * squares[1]
  return -dot * jax.lax.rsqrt(jnp.maximum(squares, 1e-16))


def simsiam_loss(p1: ArrayLike, p2: ArrayLike, z1: ArrayLike, z2: ArrayLike) -> jax.Array:
  """Symmetric negative cosine similarity: `mean(D(p1, z2) + D(p2, z1)) / 2`, in [-1, 1].

  D is `negative_cosine_similarity`; the targets z1, z2 carry no gradient.

  Args:
    p1: predictions from the first views, `[batch, dim]`.
    p2: predictions from the second views, `[batch, dim]`.
    z1: projections of the first views, `[batch, dim]`.
    z2: projections of the second views, `[batch, dim]`.

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: if the shapes differ.

  References:
    Chen & He, Exploring Simple Siamese Representation Learning, CVPR 2021, eq. 4
    (https://arxiv.org/abs/2011.10566).
  """
  require_same_shape(p1=p1, p2=p2, z1=z1, z2=z2)
  both = negative_cosine_similarity(p1, z2) + negative_cosine_similarity(p2, z1)
  return jnp.mean(both) / 2


def byol_loss(p1: ArrayLike, p2: ArrayLike, z1: ArrayLike, z2: ArrayLike) -> jax.Array:
  """Squared distance of unit predictions and targets, summed over the two directions.

    mean(2 - 2 cos(p1, sg(z2)) + 2 - 2 cos(p2, sg(z1))), in [0, 8]

  Args:
    p1: predictions of the online network from the first views, `[batch, dim]`.
    p2: the same from the second views, `[batch, dim]`.
    z1: projections of the target network from the first views, `[batch, dim]`; no gradient.
    z2: the same from the second views, `[batch, dim]`; no gradient.

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: if the shapes differ.

  References:
    Grill et al., Bootstrap Your Own Latent, NeurIPS 2020, eq. 2 (https://arxiv.org/abs/2006.07733).
  """
  return 4 + 4 * simsiam_loss(p1, p2, z1, z2)


def ssql_loss(
  p1: ArrayLike,
  p2: ArrayLike,
  p1_quantized: ArrayLike,
  p2_quantized: ArrayLike,
  z1: ArrayLike,
  z2: ArrayLike,
) -> jax.Array:
  """Mean of the full-precision and the quantized `simsiam_loss`, both towards full-precision targets.

    (simsiam_loss(p1, p2, z1, z2) + simsiam_loss(p1_quantized, p2_quantized, z1, z2)) / 2

  Args:
    p1: predictions from the first views by the full-precision network, `[batch, dim]`.
    p2: the same from the second views, `[batch, dim]`.
    p1_quantized: predictions from the first views by the fake-quantized network, `[batch, dim]`.
    p2_quantized: the same from the second views, `[batch, dim]`.
    z1: targets of the first views in full precision, `[batch, dim]`; no gradient.
    z2: targets of the second views in full precision, `[batch, dim]`; no gradient.

  Returns:
    A scalar in [-1, 1], float32 or wider.

  Raises:
    ValueError: if the shapes differ.

  References:
    Cao et al., Synergistic Self-supervised and Quantization Learning, ECCV 2022
    (https://arxiv.org/abs/2207.05432). The authors' code takes the mean of the two terms.
  """
  plain = simsiam_loss(p1, p2, z1, z2)
  return (plain + simsiam_loss(p1_quantized, p2_quantized, z1, z2)) / 2


def dino_loss(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  center: ArrayLike,
  num_crops: int,
  teacher_temperature: ArrayLike = 0.04,
  student_temperature: ArrayLike = 0.1,
) -> jax.Array:
  """Cross-entropy of the student's crops to the teacher's two global crops.

  With `P_t = sg(softmax((teacher_logits - center) / teacher_temperature))` and
  `P_s = softmax(student_logits / student_temperature)`, the mean over images of `-sum(P_t log P_s)`,
  averaged over the `2 (num_crops - 1)` pairs of a teacher crop i in {0, 1} and a student crop v != i.

  Args:
    student_logits: `[num_crops * batch, num_prototypes]`, all of crop 0 first, then all of crop 1, ..., or
      `[num_crops, batch, num_prototypes]`; crops 0 and 1 are the global ones.
    teacher_logits: `[2 * batch, num_prototypes]` in the same order, or `[2, batch, num_prototypes]`; no
      gradient.
    center: `[num_prototypes]` or `[1, num_prototypes]`, see `dino_center_update`.
    num_crops: crops of an image the student sees, 2 + the local ones.
    teacher_temperature: positive scalar, see `dino_teacher_temperature`.
    student_temperature: positive scalar.

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: if `num_crops < 2`, rows are not divisible, shapes do not fit, or a temperature is not
      positive.

  References:
    Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021, eq. 3
    (https://arxiv.org/abs/2104.14294).
  """
  require_positive(teacher_temperature=teacher_temperature, student_temperature=student_temperature)
  if num_crops < 2:
    raise ValueError(f'num_crops must be at least 2 (the two global crops), got {num_crops}.')
  student, teacher = jnp.shape(student_logits), jnp.shape(teacher_logits)
  by_crop = len(student) == 3 and student[0] == num_crops
  if not by_crop and (len(student) != 2 or student[0] % num_crops):
    raise ValueError(
      f'student_logits must have num_crops * batch rows with num_crops = {num_crops}, got {student}.'
    )
  batch, count = student[1] if by_crop else student[0] // num_crops, student[-1]
  if teacher not in ((2 * batch, count), (2, batch, count)):
    raise ValueError(
      f'teacher_logits must be [2 * batch, num_prototypes] = {(2 * batch, count)}, got {teacher}.'
    )
  if jnp.shape(center) not in ((count,), (1, count)):
    raise ValueError(f'center must be [{count}] or [1, {count}], got {jnp.shape(center)}.')
  student_logits, teacher_logits, center = accumulated(student_logits, teacher_logits, center)
  masked = teacher_logits == -jnp.inf
  centered = jnp.where(masked, -jnp.inf, teacher_logits - jnp.where(center == -jnp.inf, 0, center))
  targets = jax.nn.softmax(centered / teacher_temperature, axis=-1)
  targets = jax.lax.stop_gradient(targets).reshape(2, batch, count)
  log_probs = jax.nn.log_softmax(student_logits / student_temperature, axis=-1)
  # A masked prototype's -inf times its target of 0 would be NaN.
  log_probs = jnp.maximum(log_probs, jnp.finfo(log_probs.dtype).min)
  pairs = -jnp.einsum('ink,vnk->iv', targets, log_probs.reshape(num_crops, batch, count)) / batch
  return jnp.sum(jnp.where(jnp.eye(2, num_crops, dtype=bool), 0, pairs)) / (2 * (num_crops - 1))


def dino_center_update(
  center: ArrayLike, teacher_logits: ArrayLike, momentum: ArrayLike = 0.9
) -> jax.Array:
  """Moving average of the teacher's logits: `momentum * center + (1 - momentum) * mean(logits)`.

  Taken after the loss of the same step, over all rows of the global batch.

  Args:
    center: `[num_prototypes]` or `[1, num_prototypes]`.
    teacher_logits: `[rows, num_prototypes]`.
    momentum: share of the old center.

  Returns:
    The new center, of the shape and dtype of `center`; carries no gradient.

  References:
    Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021, eq. 4.
  """
  (logits,) = accumulated(jax.lax.stop_gradient(teacher_logits))
  center = jnp.asarray(center)
  mean = jnp.mean(logits, axis=0).reshape(center.shape)
  return (momentum * center + (1 - momentum) * mean).astype(center.dtype)


def dino_teacher_temperature(
  epoch: ArrayLike,
  warmup_temperature: float = 0.04,
  temperature: float = 0.07,
  warmup_epochs: int = 30,
) -> jax.Array:
  """The teacher's temperature in an epoch: `linspace(warmup, final, warmup_epochs)`, then constant.

  Both ends belong to the warm-up: epoch `warmup_epochs - 1` has the final temperature already.

  Args:
    epoch: epochs finished, integer (may be traced).
    warmup_temperature: at epoch 0.
    temperature: from the end of the warm-up on. The paper recommends 0.04 -> 0.07 in 30 epochs.
    warmup_epochs: length of the warm-up; 0 for none.

  Returns:
    A float scalar (or an array of the shape of `epoch`).
  """
  share = jnp.asarray(epoch, jnp.result_type(float)) / max(warmup_epochs - 1, 1)
  ramp = warmup_temperature + (temperature - warmup_temperature) * share
  return jnp.where(jnp.asarray(epoch) < warmup_epochs, ramp, temperature)


def cross_correlation(z1: ArrayLike, z2: ArrayLike, epsilon: float = 1e-5) -> jax.Array:
  """Correlation matrix between the dimensions of two views over the batch.

  Each dimension is standardized over the (global) batch, `(z - mean) / sqrt(var + epsilon)` with the
  biased variance; then `C = z1.T @ z2 / batch`. A constant dimension correlates with nothing (0).

  Args:
    z1: `[batch, dim]`.
    z2: `[batch, dim]`.
    epsilon: added to the variance.

  Returns:
    `[dim, dim]`, float32 or wider.

  Raises:
    ValueError: if the shapes differ, or for a batch of one.
  """
  require_same_shape(2, z1=z1, z2=z2)
  if jnp.shape(z1)[0] < 2:
    raise ValueError(f'Statistics over the batch need at least 2 rows, got {jnp.shape(z1)}.')
  z1, z2 = (
    (z - jnp.mean(z, axis=0)) * jax.lax.rsqrt(jnp.var(z, axis=0) + epsilon)
    for z in accumulated(z1, z2)
  )
  return z1.T @ z2 / z1.shape[0]


def barlow_twins_loss(
  z1: ArrayLike, z2: ArrayLike, redundancy_weight: float = 0.0051, epsilon: float = 1e-5
) -> jax.Array:
  """Pulls the cross-correlation matrix C of two views towards the identity.

    sum_i (C[i, i] - 1)^2 + redundancy_weight * sum_{i != j} C[i, j]^2

  Args:
    z1: projections of the first views, `[batch, dim]`.
    z2: projections of the second views, `[batch, dim]`.
    redundancy_weight: lambda of the paper.
    epsilon: added to the variance, see `cross_correlation`.

  Returns:
    A scalar, float32 or wider; sums over dimensions, not means.

  Raises:
    ValueError: if the shapes differ, or for a batch of one.

  References:
    Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, ICML 2021, eq. 1
    (https://arxiv.org/abs/2103.03230).

  Examples:
    >>> z = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> round(float(barlow_twins_loss(z, z)), 6)
    0.0
  """
  correlation = cross_correlation(z1, z2, epsilon)
  diagonal = jnp.diagonal(correlation)
  on_diagonal = jnp.sum((diagonal - 1) ** 2)
  # Masked, not total minus diagonal: the difference of two nearly equal sums would lose the digits.
  off_diagonal = jnp.where(jnp.eye(diagonal.size, dtype=bool), 0, correlation)
  return on_diagonal + redundancy_weight * jnp.sum(off_diagonal**2)
