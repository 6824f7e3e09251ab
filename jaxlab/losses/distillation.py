"""Losses that make a student's predictions follow a teacher's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import (
  accumulated,
  require_not_negative,
  require_positive,
  require_same_shape,
  require_share,
)
from jaxlab.losses.classification import cross_entropy
from jaxlab.losses.long_tail import balanced_softmax_loss


def distillation_loss(
  student_logits: ArrayLike, teacher_logits: ArrayLike, temperature: ArrayLike
) -> jax.Array:
  """Divergence of the softened predictions, times the squared temperature.

    loss = T^2 KL(softmax(sg(teacher) / T) || softmax(student / T))

  with sg the stop-gradient. The factor keeps the gradient's size when T changes. The teacher's entropy is
  part of the value, so that it is 0 where student and teacher agree. Classes that the teacher masks add
  nothing; the loss is infinite if the student masks one that the teacher does not.

  Args:
    student_logits: `[..., num_classes]`; -inf masks a class.
    teacher_logits: `[..., num_classes]`; -inf masks a class; no gradient.
    temperature: positive scalar T.

  Returns:
    `[...]`, float32 or wider, in nats.

  Raises:
    ValueError: if the shapes differ or `temperature <= 0`.

  References:
    Hinton et al., Distilling the Knowledge in a Neural Network, 2015 (https://arxiv.org/abs/1503.02531).

  Examples:
    >>> distillation_loss(jnp.zeros((1, 2)), jnp.array([[3.0, 3.0]]), 2.0).tolist()
    [0.0]
  """
  require_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
  require_positive(temperature=temperature)
  student_logits, teacher_logits = accumulated(student_logits, teacher_logits)
  teacher_logits = jax.lax.stop_gradient(teacher_logits)
  log_targets = jax.nn.log_softmax(teacher_logits / temperature)
  targets = jnp.exp(log_targets)
  terms = targets * (log_targets - jax.nn.log_softmax(student_logits / temperature))
  # Without it a class that is masked in both gives 0 * (inf - inf).
  return temperature**2 * jnp.sum(jnp.where(targets == 0, 0, terms), axis=-1)


def mixup_distillation_loss(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  labels: ArrayLike,
  partner_labels: ArrayLike,
  share: ArrayLike,
  *,
  temperature: ArrayLike = 2.0,
  weight: ArrayLike = 0.7,
  label_weight: ArrayLike | None = None,
) -> jax.Array:
  """Distillation next to the cross-entropies of a mixed image's two labels, of each example (CURL, UP-ViTs).

    weight * distillation_loss + label_weight (share CE(label) + (1 - share) CE(partner's label))

  CURL's label weight is `1 - weight`. UP-ViTs take 1, and 0.2 times the sum of the divergences over the 32
  images of a device: as a mean over images the weight of distillation is 0.2 * 32, at temperature 1.

  Args:
    student_logits: of mixed images, `[..., num_classes]`.
    teacher_logits: of the same mixed images; no gradient.
    labels: integers `[...]`, of the images.
    partner_labels: integers `[...]`, of those that were mixed in.
    share: of the first, in [0, 1].
    temperature: see `distillation_loss`.
    weight: of the distillation, in [0, 1] if there is no weight of the labels.
    label_weight: of the labels; None: `1 - weight`.

  Returns:
    `[...]`, float32 or wider.

  Raises:
    ValueError: if shapes or labels do not fit, or numbers are out of their range.

  References:
    Luo & Wu, Neural Network Pruning with Residual-Connections and Limited-Data, CVPR 2020
    (https://arxiv.org/abs/1911.08114), section on limited data. Yu & Wu, A Unified Pruning Framework for
    Vision Transformers, 2023 (https://arxiv.org/abs/2111.15127), the official code.

  Examples:
    >>> z, labels = jnp.zeros((1, 2)), jnp.array([0])
    >>> round(float(mixup_distillation_loss(z, z, labels, 1 - labels, 0.6)[0]), 4)
    0.2079
  """
  require_share(share=share)
  if label_weight is None:
    require_share(weight=weight)
    label_weight = 1 - weight
  require_not_negative(weight=weight, label_weight=label_weight)
  told = distillation_loss(student_logits, teacher_logits, temperature)
  first = cross_entropy(student_logits, labels)
  second = cross_entropy(student_logits, partner_labels)
  return weight * told + label_weight * (share * first + (1 - share) * second)


def flatten_distribution(
  logits: ArrayLike, temperature: ArrayLike, power: ArrayLike = 1.0
) -> jax.Array:
  """DiVE's soft targets: `softmax(logits / temperature)^power`, brought to sum 1 again.

  Equal to `softmax(logits * power / temperature)`, which is how it is computed.

  Args:
    logits: `[..., num_classes]`, of the teacher.
    temperature: positive scalar.
    power: positive scalar; 0.5 in DiVE's configurations.

  Returns:
    `[..., num_classes]`, float32 or wider.

  Raises:
    ValueError: if `logits` has no axis, `temperature <= 0` or `power <= 0`.

  References:
    He et al., Distilling Virtual Examples for Long-tailed Recognition, ICCV 2021
    (https://arxiv.org/abs/2103.15042).
  """
  require_same_shape(logits=logits)
  require_positive(temperature=temperature, power=power)
  (logits,) = accumulated(logits)
  return jax.nn.softmax(logits * (power / temperature))


def virtual_example_counts(
  logits: ArrayLike, temperature: ArrayLike, power: ArrayLike = 1.0
) -> jax.Array:
  """How many virtual examples of each class a teacher sees: the sum of its soft targets over examples.

  Distillation helps the tail if this distribution is flatter than the class counts; choose `temperature`
  and `power` by it. The sum over classes is the number of examples; towards infinite temperature every
  class has the same share.

  Args:
    logits: `[..., num_classes]`, of the teacher on all training examples.
    temperature: positive scalar.
    power: positive scalar, see `flatten_distribution`.

  Returns:
    `[num_classes]`, float32 or wider.

  Raises:
    ValueError: as `flatten_distribution`.

  References:
    He et al., Distilling Virtual Examples for Long-tailed Recognition, ICCV 2021
    (https://arxiv.org/abs/2103.15042).

  Examples:
    >>> virtual_example_counts(jnp.array([[0.0, 0.0], [jnp.log(3.0), 0.0]]), 1.0).tolist()
    [1.25, 0.75]
  """
  probs = flatten_distribution(logits, temperature, power)
  return jnp.sum(probs, axis=range(probs.ndim - 1))


def dive_loss(
  student_logits: ArrayLike,
  teacher_logits: ArrayLike,
  labels: ArrayLike,
  class_counts: ArrayLike,
  *,
  temperature: ArrayLike = 2.0,
  power: ArrayLike = 0.5,
  alpha: ArrayLike = 0.5,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Distillation of virtual examples next to the balanced softmax loss, means over the batch.

    p_t = flatten_distribution(sg(teacher_logits), T, power)
    loss = alpha mean(T^2 KL(p_t || softmax(student_logits / T)))
           + (1 - alpha) mean(balanced_softmax_loss(student_logits))

  The power flattens the teacher only. The class counts enter the second term alone.

  Args:
    student_logits: `[..., num_classes]`.
    teacher_logits: `[..., num_classes]`, of the frozen teacher on the same augmented images; no gradient.
    labels: integers, `[...]`.
    class_counts: positive integers, `[num_classes]`.
    temperature: positive scalar T.
    power: positive scalar.
    alpha: in [0, 1]; 0 is the balanced softmax loss.

  Returns:
    The scalar loss, float32 or wider, and a dict of its terms before they are mixed, `distillation` and
    `balanced_softmax`.

  Raises:
    ValueError: if the shapes do not fit, or values are (where concrete) out of range.

  References:
    He et al., Distilling Virtual Examples for Long-tailed Recognition, ICCV 2021
    (https://arxiv.org/abs/2103.15042). The defaults are those of the code BagofTricks-LT for CIFAR.
  """
  require_share(alpha=alpha)
  require_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
  require_positive(power=power)
  (teacher_logits,) = accumulated(teacher_logits)
  distillation = jnp.mean(distillation_loss(student_logits, power * teacher_logits, temperature))
  balanced = jnp.mean(balanced_softmax_loss(student_logits, labels, class_counts))
  loss = alpha * distillation + (1 - alpha) * balanced
  return loss, {'distillation': distillation, 'balanced_softmax': balanced}
