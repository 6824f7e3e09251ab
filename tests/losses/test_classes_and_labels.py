"""The rules that hold for all losses on logits: masked classes, and labels out of range."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close

from jaxlab import losses

CLASSES, BATCH, MASKED = 5, 6, 3
COUNTS = np.array([50, 30, 20, 10, 5])
LABELS = np.array([0, 1, 4, 2, 4, 0])
SMOOTHING = np.array([0.1, 0.2, 0.3, 0.4, 0.5])


def arrays(seed, shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


FEATURES = losses.normalize(arrays(1, (BATCH + 2, 4)))
OTHERS = np.array([1, 0])


def experts(logits):
  return jnp.stack([logits, 0.5 * logits])


def paco(smoothing):
  def loss(logits, labels, keep):
    return losses.paco_loss(
      FEATURES, jnp.concatenate([labels, OTHERS]), logits, smoothing=smoothing, alpha=0.5
    )

  return loss


def of_both(pair):
  return pair.loss1 + pair.loss2


# `(logits, labels, keep)`, where `keep` are the classes that the logits' axis has.
LABELED = {
  'cross_entropy': lambda z, y, keep: losses.cross_entropy(z, y),
  'label_smoothing_cross_entropy': lambda z, y, keep: losses.label_smoothing_cross_entropy(z, y),
  'weighted_cross_entropy': lambda z, y, keep: losses.weighted_cross_entropy(
    z, y, 1 / COUNTS[keep]
  ),
  'focal_loss': lambda z, y, keep: losses.focal_loss(z, y, 2.0, 1 / COUNTS[keep]),
  'sigmoid_focal_loss': lambda z, y, keep: losses.sigmoid_focal_loss(z, y, alpha=0.25),
  'qfd_loss': lambda z, y, keep: losses.qfd_loss(z, y, FEATURES, FEATURES[::-1])[0],
  'ldam_loss': lambda z, y, keep: losses.ldam_loss(z, y, COUNTS[keep], 1 / COUNTS[keep], scale=2.0),
  'balanced_softmax_loss': lambda z, y, keep: losses.balanced_softmax_loss(z, y, COUNTS[keep]),
  'logit_adjusted_loss': lambda z, y, keep: losses.logit_adjusted_loss(z, y, COUNTS[keep], 0.7),
  'label_aware_smoothing_loss': lambda z, y, keep: losses.label_aware_smoothing_loss(
    z, y, SMOOTHING[keep]
  ),
  'gml_loss': lambda z, y, keep: losses.gml_loss(z, y, COUNTS[keep], power=1.5),
  'dive_loss': lambda z, y, keep: losses.dive_loss(z, 2 * z[::-1], y, COUNTS[keep])[0],
  'ncl_loss': lambda z, y, keep: losses.ncl_loss(experts(z), y, COUNTS[keep], num_hard=3),
  'label_refinement_loss': lambda z, y, keep: losses.label_refinement_loss(z, 3 * z[::-1], y),
  'mixup_distillation_loss': lambda z, y, keep: losses.mixup_distillation_loss(
    z, 2 * z[::-1], y, y, 0.6
  ),
  'peer_learning_loss': lambda z, y, keep: of_both(
    losses.peer_learning_loss(z, 2 * z[::-1], y, 0.0)
  ),
  'co_teaching_loss': lambda z, y, keep: of_both(losses.co_teaching_loss(z, 2 * z[::-1], y, 0.0)),
  'decoupling_loss': lambda z, y, keep: of_both(losses.decoupling_loss(z, 2 * z[::-1], y)),
  'pencil_loss': lambda z, y, keep: losses.pencil_loss(z, 3 * z[::-1], y),
  'pencil_terms': lambda z, y, keep: sum(
    losses.pencil_terms(z, 3 * z[::-1], y, compatibility='paper')
  ),
  'paco_loss': paco(0.0),
  'paco_loss, smoothed': paco(0.2),
  'token_classifier_loss': lambda z, y, keep: losses.token_classifier_loss(
    z, y, np.ones(y.shape, bool)
  ),
  'max_entropy_loss': lambda z, y, keep: losses.max_entropy_loss(z, y, 0.5),
  'pairwise_confusion': lambda z, y, keep: losses.pairwise_confusion(z, y),
  'acsr_loss': lambda z, y, keep: losses.acsr_loss(z, y, FEATURES, FEATURES[::-1])[0],
  'next_token_cross_entropy': lambda z, y, keep: losses.next_token_cross_entropy(
    z[None], jnp.concatenate([y[:1] * 0, y])[None]
  ),
}
UNLABELED = {
  'distillation_loss': lambda z, keep: losses.distillation_loss(z, z[::-1], 2.0),
  'label_distribution_loss': lambda z, keep: losses.label_distribution_loss(z, 3 * z[::-1]),
  'd2_loss': lambda z, keep: losses.d2_loss(z, 3 * z[::-1]),
  'd2_loss, kl': lambda z, keep: losses.d2_loss(z, 3 * z[::-1], kind='kl'),
  'd2_loss, mse': lambda z, keep: losses.d2_loss(z, 3 * z[::-1], kind='mse'),
  'dino_loss': lambda z, keep: losses.dino_loss(z, 0.3 * z[:4], 0.1 * z[0], 3),
}
# It takes labels and returns which classes are hard; it only compares labels, which have no range.
# Their labels are no classes of logits, or of those of a teacher.
NOT_HERE = {
  'hard_categories',
  'initial_label_logits',
  'mean_where_right',
  'multi_label_bce',
  'multi_label_queue_loss',
  'neighbor_queue_loss',
  'supervised_contrastive_loss',
}


def masked_and_reduced():
  """Returns logits with a masked class, the same without the class, and the other classes."""
  logits = arrays(0, (BATCH, CLASSES)).at[:, MASKED].set(-jnp.inf)
  keep = np.delete(np.arange(CLASSES), MASKED)
  return logits, logits[:, keep], keep


def value_and_gradient(loss, logits):
  return jax.jit(jax.value_and_grad(lambda z: jnp.mean(loss(z))))(logits)


def test_every_public_loss_with_labels_is_here():
  public = {
    name
    for name in losses.__all__
    if inspect.isfunction(getattr(losses, name))
    # There labels are a grid of values.
    and not getattr(losses, name).__module__.endswith('label_distributions')
    and {'labels', 'tokens'} & set(inspect.signature(getattr(losses, name)).parameters)
  }
  assert public - NOT_HERE == {name.split(',')[0] for name in LABELED}


@pytest.mark.parametrize('name', tables.some([*LABELED, *UNLABELED], 4))
def test_masked_class_is_a_class_that_is_not_there(name):
  logits, reduced, keep = masked_and_reduced()
  if name in LABELED:
    index = np.searchsorted(keep, LABELS)
    found = value_and_gradient(lambda z: LABELED[name](z, LABELS, np.arange(CLASSES)), logits)
    expected = value_and_gradient(lambda z: LABELED[name](z, index, keep), reduced)
  else:
    found = value_and_gradient(lambda z: UNLABELED[name](z, None), logits)
    expected = value_and_gradient(lambda z: UNLABELED[name](z, None), reduced)
  assert_close(found[0], expected[0], 1e-5)
  assert_close(found[1][:, keep], expected[1], 1e-5, atol=1e-7)
  np.testing.assert_array_equal(found[1][:, MASKED], 0)


def test_masked_classes_in_float64():
  logits, reduced, keep = (np.asarray(a, np.float64) for a in masked_and_reduced())
  log_probs = reduced - np.log(np.exp(reduced).sum(1, keepdims=True))
  own = log_probs[np.arange(BATCH), np.searchsorted(keep, LABELS)]
  smoothed = losses.label_smoothing_cross_entropy(jnp.asarray(logits, jnp.float32), LABELS, 0.2)
  assert_close(smoothed, -0.8 * own - 0.2 * log_probs.mean(1), 1e-5)
  teacher = np.exp(log_probs[::-1])
  logits = jnp.asarray(logits, jnp.float32)
  divergence = losses.distillation_loss(logits, logits[::-1], 1.0)
  assert_close(divergence, (teacher * (log_probs[::-1] - log_probs)).sum(1), 1e-5)


@pytest.mark.parametrize(
  'name', tables.some(sorted(set(LABELED) - {'gml_loss', 'pairwise_confusion'}), 3)
)
def test_label_that_is_masked_has_an_infinite_loss(name):
  logits, _, _ = masked_and_reduced()
  labels = LABELS.copy()
  labels[2] = MASKED
  assert np.max(LABELED[name](logits, labels, np.arange(CLASSES))) == np.inf


def test_class_that_the_student_alone_masks_costs_infinitely_much():
  logits, _, _ = masked_and_reduced()
  assert np.all(losses.distillation_loss(logits, jnp.zeros_like(logits), 1.0) == np.inf)
  assert float(losses.dino_loss(logits, jnp.zeros((4, CLASSES)), jnp.zeros(CLASSES), 3)) > 1e30


@pytest.mark.parametrize('label', tables.few([-1, CLASSES, CLASSES + 7, -CLASSES], CLASSES))
@pytest.mark.parametrize('name', LABELED)
def test_label_out_of_range_is_an_error_or_nan_and_no_number(name, label):
  labels = LABELS.copy()
  labels[2] = label
  logits = arrays(0, (BATCH, CLASSES))
  all_classes = np.arange(CLASSES)
  with pytest.raises(ValueError, match=r'(labels|tokens) must be in'):
    LABELED[name](logits, labels, all_classes)

  @jax.jit
  @jax.value_and_grad
  def loss(z, y):
    return jnp.mean(LABELED[name](z, y, all_classes))

  value, gradient = loss(logits, labels)
  assert np.isnan(value) and np.isnan(gradient).any()
  each = np.asarray(jax.jit(lambda z, y: LABELED[name](z, y, all_classes))(logits, labels))
  if each.ndim:
    np.testing.assert_array_equal(np.isnan(each.reshape(-1)), np.arange(BATCH) == 2)


def test_hard_categories_of_a_label_out_of_range_are_none():
  found = jax.jit(losses.hard_categories, static_argnums=2)(arrays(0, (2, 4)), np.array([-1, 1]), 2)
  assert found.sum(1).tolist() == [0, 2]


def test_ignored_positions_may_hold_any_label():
  logits, labels = arrays(0, (BATCH, CLASSES)), LABELS.copy()
  labels[2] = -100
  mask = labels >= 0
  found = jax.jit(lambda y: losses.gml_loss(logits, y, COUNTS, mask=mask))(labels)
  assert_close(found, losses.gml_loss(logits[mask], labels[mask], COUNTS), 1e-6)
  tokens, real = np.concatenate([[0], labels])[None], np.concatenate([[True], mask])[None]
  terms = jax.jit(losses.next_token_cross_entropy)(logits[None], tokens, real)[0]
  expected = losses.cross_entropy(logits, np.where(mask, labels, 0))
  counts = mask & np.roll(mask, 1)
  counts[0] = mask[0]
  assert_close(terms, np.where(counts, expected, 0), 1e-6)
