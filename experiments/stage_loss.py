"""Losses of classification by the names that configurations give them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxlab.losses import classification, distillation, long_tail

Array = jax.Array

Loss = Callable[[Array, Array, Array | None, Array], Array]


def make_loss(stage: ConfigDict, counts: np.ndarray, steps_per_epoch: int) -> Loss:
  """Returns `(logits, labels, teacher_logits, step) -> scalar`, the loss `stage.loss` with its options.

  'cross_entropy', 'label_smoothing' (smoothing), 'class_balanced' (beta, start: cross-entropy with the
  weights of the effective number, from epoch `start` on), 'balanced_softmax', 'logit_adjusted' (tau), 'ldam'
  (max_margin, scale, beta, start: the weights deferred, DRW), 'focal' (gamma), 'gml' (power),
  'label_aware_smoothing' (head, tail, shape), and from a teacher 'distillation'
  (`alpha` KL + `(1 - alpha)` cross-entropy; temperature, alpha) and 'dive' (temperature, power, alpha).

  Args:
    stage: of `config.stages`.
    counts: training images of each class, `[num_classes]`. A stage with a `cap` sees at most so many of each;
      only the smoothing per class follows the counts as they are.
    steps_per_epoch: of the stage.

  Raises:
    ValueError: for another name, options out of range, or a loss of a teacher without one.
  """
  options = stage.loss.to_dict()
  name = options.pop('name')
  names = (
    'cross_entropy', 'label_smoothing', 'class_balanced', 'balanced_softmax', 'logit_adjusted', 'ldam',
    'focal', 'gml', 'label_aware_smoothing', 'distillation', 'dive',
  )  # fmt: skip
  if name not in names:
    raise ValueError(f'loss.name={name!r}: expected one of {", ".join(names)}.')
  if (name in ('distillation', 'dive')) != bool(stage.teacher):
    raise ValueError(f'loss.name={name!r} with teacher={stage.teacher!r}: one needs the other.')
  beta, start = options.pop('beta', 0.0), options.pop('start', 0)
  if name == 'label_aware_smoothing':
    smoothing = long_tail.label_aware_smoothing(counts, **options)
  counts = np.minimum(counts, stage.cap or counts)

  def weights(step: Array) -> Array:
    epoch = jnp.asarray(step) // steps_per_epoch
    return long_tail.deferred_class_weights(counts, epoch, start, beta)

  def loss(logits: Array, labels: Array, teacher: Array | None, step: Array) -> Array:
    match name:
      case 'cross_entropy':
        values = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      case 'label_smoothing':
        values = classification.label_smoothing_cross_entropy(logits, labels, **options)
      case 'class_balanced':
        values = classification.weighted_cross_entropy(logits, labels, weights(step))
      case 'balanced_softmax':
        values = long_tail.balanced_softmax_loss(logits, labels, counts)
      case 'logit_adjusted':
        values = long_tail.logit_adjusted_loss(logits, labels, counts, **options)
      case 'ldam':
        values = long_tail.ldam_loss(logits, labels, counts, weights(step), **options)
      case 'focal':
        values = classification.focal_loss(logits, labels, **options)
      case 'gml':
        values = long_tail.gml_loss(logits, labels, counts, **options)
      case 'label_aware_smoothing':
        values = long_tail.label_aware_smoothing_loss(logits, labels, smoothing)
      case 'distillation':
        alpha = options['alpha']
        own = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        soft = distillation.distillation_loss(logits, teacher, options['temperature'])
        values = alpha * soft + (1 - alpha) * own
      case 'dive':
        values, _ = distillation.dive_loss(logits, teacher, labels, counts, **options)
    return jnp.mean(values)

  logits = jax.ShapeDtypeStruct((2, len(counts)), jnp.float32)
  labels, step = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), ()))
  try:  # now, not when the stages before this one are trained
    jax.eval_shape(loss, logits, labels, logits, step)
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f'loss.name={name!r}: {error}') from None
  return loss
