"""PENCIL's and D2's losses and label updates: parity, gradients, what the papers prove."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab import losses, training


def float32(*arrays):
  return [jnp.asarray(array, jnp.float32) for array in arrays]


@golden('pencil', 'losses_stage2')
@pytest.mark.parametrize('form', ['code', 'paper'])
def test_pencil_and_its_label_step_agree_with_official_code(vectors, form):
  logits, label_logits = float32(vectors['in_logits'], vectors['in_label_logits'])
  labels = vectors['in_noisy_labels']
  alpha, beta, rate = (vectors.param(name) for name in ('alpha', 'beta', 'lambda'))
  terms = losses.pencil_terms(logits, label_logits, labels, compatibility=form)
  assert_close(jnp.mean(terms.classification), vectors['out_classification_loss'])
  assert_close(jnp.mean(terms.entropy), vectors['out_entropy_loss'])
  assert_close(jnp.mean(terms.compatibility), vectors[f'out_compatibility_loss_{form}'])

  def loss(logits, label_logits):
    own = losses.pencil_loss(logits, label_logits, labels, alpha, beta, compatibility=form)
    return jnp.mean(own)

  value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(logits, label_logits)
  assert_close(value, vectors[f'out_total_loss_{form}'])
  assert_close(gradients[0], vectors['grad_logits'], 2e-5)
  assert_close(gradients[1], vectors[f'grad_label_logits_{form}'], 2e-5)
  # In a table among other rows, in another order.
  index = np.random.default_rng(0).permutation(len(labels) + 3)[: len(labels)]
  table = np.full((len(labels) + 3, logits.shape[-1]), 7, np.float32)
  table[index] = label_logits
  new = training.step_rows(table, index, gradients[1], rate)
  assert_close(new[index], vectors[f'out_new_label_logits_{form}'], 2e-5)
  others = np.setdiff1d(np.arange(len(table)), index)
  np.testing.assert_array_equal(new[others], 7)


@golden('pencil', 'loss_stage3')
def test_the_loss_on_corrected_labels_agrees_with_official_code(vectors):
  logits, label_logits = float32(vectors['in_logits'], vectors['in_label_logits'])
  loss = lambda z, y: jnp.mean(losses.label_distribution_loss(z, y))  # noqa: E731
  value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(logits, label_logits)
  assert_close(value, vectors['out_loss'])
  assert_close(gradients[0], vectors['grad_logits'], 2e-5)
  np.testing.assert_array_equal(gradients[1], 0)


@golden('r2d2', 'd2_step')
def test_d2_and_its_label_step_agree_with_official_code(vectors):
  (logits, table), index = (
    float32(vectors['in_logits'], vectors['in_pseudo_label_table']),
    vectors['in_index'],
  )
  kind = str(vectors['param_class_loss_type'])
  unlabeled = np.arange(len(index)) < int(len(index) * vectors.param('unlabeled_ratio'))
  weights = vectors.param('class_weight'), vectors.param('entropy_weight')

  def loss(logits, rows, alpha=weights[0], beta=weights[1]):
    return jnp.mean(losses.d2_loss(logits, rows, alpha, beta, kind=kind))

  rows = training.read_rows(table, index)
  assert_close(loss(logits, rows, 1.0, 0.0), vectors['out_class_loss_unweighted'])
  assert_close(loss(logits, rows, 0.0, 1.0), vectors['out_entropy_unweighted'])
  value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(logits, rows)
  assert_close(value, vectors['out_total_loss'])
  assert_close(gradients[0], vectors['grad_logits'], 2e-5)
  new = training.step_rows(table, index, gradients[1], vectors.param('label_lr'), unlabeled)
  assert_close(new, vectors['out_new_pseudo_label_table'], 2e-5)
  labeled = index[~unlabeled]
  np.testing.assert_array_equal(new[labeled], table[labeled])
  np.testing.assert_allclose(jnp.sum(new, -1), jnp.sum(table, -1), rtol=1e-4, atol=1e-4)


@golden('curl', 'label_refinement')
def test_refined_labels_agree_with_official_code(vectors):
  (table,) = float32(vectors['in_pseudo_logits'])
  weight, rate = vectors.param('weight_kl'), vectors.param('label_lr')
  for step in range(sum(name.startswith('in_index_step') for name in vectors)):
    index, labels = vectors[f'in_index_step{step}'], vectors[f'in_labels_step{step}']

    def loss(logits, rows, share=weight):
      return jnp.mean(losses.label_refinement_loss(logits, rows, labels, share))  # noqa: B023

    given = jnp.asarray(vectors[f'in_student_logits_step{step}']), table[index]
    assert_close(loss(*given, 1.0), vectors[f'out_kl_loss_step{step}'])
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(*given)
    assert_close(value, vectors[f'out_loss_step{step}'])
    assert_close(gradients[0], vectors[f'grad_student_logits_step{step}'], 2e-5)
    table = training.step_rows(table, index, gradients[1], rate)
    assert_close(table, vectors[f'out_pseudo_logits_step{step}'], 1e-5)


@golden('curl', 'mixup_kd_loss')
def test_distillation_of_mixed_images_agrees_with_official_code(vectors):
  share, weight = vectors.param('lambda'), vectors.param('weight_kd')
  given = vectors['in_teacher_logits'], vectors['in_labels_a'], vectors['in_labels_b'], share

  def loss(logits, weight=weight):
    options = {'temperature': vectors.param('temperature'), 'weight': weight}
    return jnp.mean(losses.mixup_distillation_loss(logits, *given, **options))

  (logits,) = float32(vectors['in_student_logits'])
  assert_close(loss(logits, 1.0), vectors['out_kd_loss'])
  assert_close(loss(logits, 0.0), vectors['out_ce_loss'])
  value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
  assert_close(value, vectors['out_loss'])
  assert_close(gradient, vectors['grad_student_logits'], 2e-5)


@golden('up_vits', 'finetune_pieces')
def test_the_sum_of_divergences_is_a_weight_of_their_mean(vectors):
  size = len(vectors['in_labels'])
  given = vectors['in_labels'], vectors['out_labels_b'], vectors['out_lambda']

  def loss(logits, weight, label_weight):
    options = {'temperature': 1.0, 'weight': weight, 'label_weight': label_weight}
    told = losses.mixup_distillation_loss(logits, vectors['in_teacher_logits'], *given, **options)
    return jnp.mean(told)

  (logits,) = float32(vectors['in_student_logits'])
  assert_close(loss(logits, 0.0, 1.0), vectors['out_ce'])
  assert_close(loss(logits, size, 0.0), vectors['out_kl_sum'])
  value, gradient = jax.jit(jax.value_and_grad(loss))(logits, 0.2 * size, 1.0)
  assert_close(value, vectors['out_total'])
  assert_close(gradient, vectors['grad_student_logits'], 2e-5)


def test_where_the_gradient_vanishes_pseudo_labels_are_a_power_of_predictions():
  pseudo_logits = jnp.array([[2.0, 0.5, -1.0, 0.0]])
  gradient = jax.jit(jax.grad(lambda z: jnp.mean(losses.d2_loss(z, pseudo_logits, 0.1, 0.03))))

  def step(logits, _):
    return logits - 30 * gradient(logits), None

  logits, _ = jax.lax.scan(step, jnp.zeros((1, 4)), None, 2000)
  log_p, log_q = (np.asarray(jax.nn.log_softmax(z)[0]) for z in (logits, pseudo_logits))
  slope, intercept = np.polyfit(log_p, log_q, 1)
  assert abs(slope - 0.7) < 1e-3
  np.testing.assert_allclose(slope * log_p + intercept, log_q, atol=1e-3)


def test_label_logits_hundreds_apart_give_finite_losses_and_gradients():
  label_logits = jnp.array([[400.0, -300.0, 0.0]])
  for loss in (
    lambda z, y: losses.pencil_loss(z, y, jnp.array([1]))[0],
    lambda z, y: losses.d2_loss(z, y)[0],
  ):
    value, gradients = jax.value_and_grad(loss, (0, 1))(jnp.zeros((1, 3)), label_logits)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda z, y: losses.pencil_terms(z, z, y, compatibility='both'), "is 'both', expected 'code'"),
    (lambda z, y: losses.pencil_loss(z, z, y + 3), r'labels must be in \[0, 3\)'),
    (lambda z, y: losses.pencil_loss(z, z[:, :2], y), 'arrays of one shape'),
    (lambda z, y: losses.pencil_loss(z, z, y, alpha=-1), 'alpha must not be negative'),
    (lambda z, y: losses.d2_loss(z, z, kind='l1'), "kind is 'l1'"),
    (lambda z, y: losses.initial_label_logits(y - 2, 3), r'labels \+ 1 must be in \[0, 4\)'),
  ],
)
def test_what_does_not_fit_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(jnp.zeros((2, 3)), jnp.array([0, 1]))
