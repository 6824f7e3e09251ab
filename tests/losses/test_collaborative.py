import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import assert_close, golden

from jaxlab.losses.collaborative import hard_categories, ncl_loss

COUNTS = np.array([100, 40, 9, 3, 1])


@pytest.fixture(params=['float32', 'float64'])
def rtol(request):
  """Runs a test in both precisions; the tolerance of each."""
  with jax.enable_x64(request.param == 'float64'):
    yield {'float32': 2e-6, 'float64': 1e-9}[request.param]


def arguments(seed=0, experts=3, batch=8):
  rng = np.random.default_rng(seed)
  logits = (2 * rng.standard_normal((experts, batch, 5))).astype(np.float32)
  return logits, rng.integers(0, 5, batch)


def value_and_grad(**options):
  return jax.jit(jax.value_and_grad(functools.partial(ncl_loss, **options)))


@golden('long_tail_protocols', 'ncl_loss')
def test_ncl_loss_and_gradient_agree_with_reference(vectors, rtol):
  step = value_and_grad(
    num_hard=vectors.param('hcm_n'),
    diversity_factor=vectors.param('diversity_factor'),
    hard_diversity_factor=vectors.param('diversity_factor_hcm'),
    ce_ratio=vectors.param('ce_ratio'),
    hard_ratio=vectors.param('hcm_ratio'),
  )
  value, grad = step(vectors['in_logits'], vectors['in_labels'], vectors['in_class_counts'])
  assert_close(value, vectors['out_loss'], rtol)
  assert_close(grad, vectors['grad_logits'], rtol)


@pytest.mark.parametrize('num_hard', [1, 2, 4, 5])
def test_hard_categories_are_the_true_class_and_the_largest_others(num_hard):
  logits, labels = arguments()
  mask = np.asarray(jax.jit(hard_categories, static_argnums=2)(logits[0], labels, num_hard))
  for row, label, chosen in zip(logits[0], labels, mask):
    others = [c for c in np.argsort(-row) if c != label][: num_hard - 1]
    assert set(np.flatnonzero(chosen)) == {label, *others}


def test_ties_of_hard_categories_go_to_the_lower_class():
  mask = hard_categories(np.zeros((2, 4), np.float32), np.array([3, 1]), 2)
  np.testing.assert_array_equal(mask, [[1, 0, 0, 1], [1, 1, 0, 0]])


def test_identical_experts_pay_no_divergence_and_all_classes_hard_doubles_the_rest():
  logits, labels = arguments()
  same = np.broadcast_to(logits[:1], logits.shape)
  value, _ = value_and_grad(num_hard=5)(same, labels, COUNTS)
  plain = optax.softmax_cross_entropy_with_integer_labels(same[0] + np.log(COUNTS), labels).mean()
  assert_close(value, 2 * 3 * plain, 1e-5)


def test_divergence_is_that_of_all_ordered_pairs():
  logits, labels = arguments()
  options = {'num_hard': 5, 'ce_ratio': 0.0, 'hard_ratio': 0.0, 'hard_diversity_factor': 0.0}
  value, _ = value_and_grad(diversity_factor=0.5, **options)(logits, labels, COUNTS)
  log_probs = np.asarray(jax.nn.log_softmax(logits + np.log(COUNTS)), np.float64)
  pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
  kl = [np.sum(np.exp(log_probs[j]) * (log_probs[j] - log_probs[i]), -1).mean() for i, j in pairs]
  assert_close(value, 0.5 / 2 * np.sum(kl), 1e-4)


def test_only_the_first_expert_chooses_the_hard_categories():
  logits, labels = arguments()
  factors = {'ce_ratio': 0.0, 'diversity_factor': 0.0, 'hard_diversity_factor': 0.0}
  value, _ = value_and_grad(num_hard=2, **factors)(logits, labels, COUNTS)
  mask = hard_categories(logits[0], labels, 2)
  expected = 0.0
  for expert in logits:
    hard = np.where(mask, expert + np.log(COUNTS), 0)
    expected += optax.softmax_cross_entropy_with_integer_labels(hard, labels).mean()
  assert_close(value, expected, 1e-5)


def test_gradient_flows_into_both_experts_and_is_finite_at_extreme_logits():
  logits, labels = arguments(experts=2)
  options = {'num_hard': 2, 'ce_ratio': 0.0, 'hard_ratio': 0.0}
  _, grad = value_and_grad(**options)(logits, labels, COUNTS)
  assert np.all(np.any(grad, axis=(1, 2)))
  value, grad = value_and_grad(num_hard=2)(1e3 * logits, labels, COUNTS)
  assert np.isfinite(value)
  assert np.all(np.isfinite(grad))


def test_loss_agrees_eagerly_under_vmap_and_in_bfloat16():
  logits, labels = (np.stack(x) for x in zip(*[arguments(seed) for seed in range(3)]))

  def loss(*args):
    return ncl_loss(*args, COUNTS, num_hard=3)

  loop = np.stack([loss(*args) for args in zip(logits, labels)])
  assert_close(jax.jit(jax.vmap(loss))(logits, labels), loop, 1e-5)
  rounded = jnp.asarray(logits[0], jnp.bfloat16)
  half = jax.jit(loss)(rounded, labels[0])
  assert half.dtype == jnp.float32
  assert_close(half, loop[0], 3e-2)


def test_batch_is_the_global_one_on_any_number_of_devices():
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  logits, labels = arguments(batch=16)
  step = value_and_grad(num_hard=2)
  one = step(logits, labels, COUNTS)
  many = step(
    jax.device_put(logits, jax.NamedSharding(mesh, jax.P(None, 'data'))),
    jax.device_put(labels, jax.NamedSharding(mesh, jax.P('data'))),
    COUNTS,
  )
  assert_close(many[0], one[0], 1e-6)
  assert_close(many[1], one[1], 2e-6)


Z, Y = arguments()


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: ncl_loss(Z[:1], Y, COUNTS, num_hard=2), 'at least 2 experts, got'),
    (lambda: ncl_loss(Z[0], Y, COUNTS, num_hard=2), r'logits must be \[experts, batch'),
    (lambda: ncl_loss(Z, Y[1:], COUNTS, num_hard=2), 'Expected logits'),
    (lambda: ncl_loss(Z, Y + 5, COUNTS, num_hard=2), r'labels must be in \[0, 5\)'),
    (lambda: ncl_loss(Z, Y, COUNTS - 1, num_hard=2), 'got 0 for class 4'),
    (lambda: ncl_loss(Z, Y, COUNTS[1:], num_hard=2), r'class_counts must be \[5\]'),
    (lambda: ncl_loss(Z, Y, COUNTS, num_hard=6), 'between 1 and 5 classes, got 6'),
    (lambda: ncl_loss(Z, Y, COUNTS, num_hard=0), 'between 1 and 5 classes, got 0'),
    (lambda: ncl_loss(Z, Y, COUNTS, num_hard=2, ce_ratio=-1), 'ce_ratio must not be negative'),
    (
      lambda: ncl_loss(Z, Y, COUNTS, num_hard=2, hard_diversity_factor=-1),
      'hard_diversity_factor must not be negative',
    ),
    (lambda: hard_categories(Z[0], Y / 2, 2), 'labels must be integers'),
  ],
)
def test_bad_arguments_raise(call, message):
  with pytest.raises(ValueError, match=message):
    call()
