import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import losses


@golden('dldl_v2', 'dldl_v2_loss')
def test_losses_agree_with_both_reductions(vectors):
  logits, y, sigma, labels = (
    jnp.asarray(vectors[name], jnp.float32)
    for name in ('in_logits', 'in_labels', 'in_sigmas', 'param_label_set')
  )
  target = losses.gaussian_label_distribution(y, sigma, labels)
  assert_close(target, vectors['out_target_distribution'], 2e-5)
  q = jax.nn.softmax(logits)
  assert_close(q, vectors['out_probabilities'])
  assert_close(losses.label_expectation(q, labels), vectors['out_expectation'], 0, 2e-5)
  for form, reduction in (('paper', 'batch'), ('code', 'elements')):

    def mean(logits, reduction=reduction):
      options = {'kl_reduction': reduction}
      found = losses.dldl_v2_loss(logits, y, sigma, labels, vectors.param('lambda'), **options)
      return jnp.mean(found.value), found

    (value, found), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(logits)
    assert_close(value, vectors[f'out_loss_{form}'], 1e-5)
    assert_close(gradient, vectors[f'grad_logits_{form}'], 2e-5)
    assert_close(found.divergence, vectors['out_kl_per_sample'], 1e-5)
    assert_close(found.regression, vectors['out_l1_per_sample'], 0, 2e-5)
    assert_close(found.expectation, vectors['out_expectation'], 0, 2e-5)


@golden('dldl_v2', 'ranking_codes')
def test_ranking_codes_and_predictions_agree(vectors):
  y, labels = (jnp.asarray(vectors[n], jnp.float32) for n in ('in_labels', 'param_label_set'))
  np.testing.assert_array_equal(losses.rank_code(y, labels), vectors['out_hard_rank_code'])
  p = losses.gaussian_label_distribution(y, vectors['in_sigmas'], labels)
  assert_close(losses.soft_rank_code(p), vectors['out_soft_rank_code'], 1e-5)
  found = losses.rank_predict(vectors['in_rank_probabilities'], labels)
  np.testing.assert_array_equal(found, vectors['out_rank_prediction'])
  # Of distributions without deviation the soft code is the hard one: ranking is label distribution learning.
  sharp = losses.soft_rank_code(losses.gaussian_label_distribution(y, 0.0, labels))
  np.testing.assert_array_equal(sharp, losses.rank_code(y, labels))
  np.testing.assert_array_equal(losses.rank_predict(sharp, labels), vectors['in_labels'])


def test_the_codes_are_a_linear_map_of_the_distributions():
  rng = np.random.default_rng(0)
  p = rng.dirichlet(np.ones(6), 4)
  total = 1 - p @ np.triu(np.ones((6, 6)))
  assert_close(losses.soft_rank_code(p), total[:, :-1], 1e-5, 1e-6)


@settings(deadline=None, max_examples=25)
@given(y=st.floats(0, 10), sigma=st.floats(0, 4))
def test_a_target_is_a_distribution_around_its_value(y, sigma):
  labels = jnp.arange(0, 10.5, 0.5)
  p = np.asarray(losses.gaussian_label_distribution(jnp.array([y]), sigma, labels))[0]
  assert np.isfinite(p).all() and abs(p.sum() - 1) < 1e-5
  assert p.argmax() in np.flatnonzero(np.abs(labels - y) <= np.abs(labels - y).min() + 1e-5)


def test_without_deviation_it_is_the_nearest_label():
  labels = jnp.array([0.0, 1.0, 2.0])
  p = losses.gaussian_label_distribution(jnp.array([1.3, 0.5, 2.0]), 0.0, labels)
  np.testing.assert_array_equal(p, [[0, 1, 0], [0.5, 0.5, 0], [0, 0, 1]])
  np.testing.assert_array_equal(losses.nearest_label(jnp.array([1.3, 0.5, 2.0]), labels), [1, 0, 2])
  step = jax.jit(
    jax.grad(lambda z: losses.dldl_v2_loss(z, jnp.array([1.3]), 0.0, labels).value.sum())
  )
  assert np.isfinite(step(jnp.zeros((1, 3)))).all()
  # The expectation is met exactly: the derivative of |0| is 0.
  ends, middle = jnp.array([0.0, 2.0]), jnp.array([1.0])
  met = jax.jit(jax.grad(lambda z: losses.dldl_v2_loss(z, middle, 1.0, ends).value.sum()))
  gradient = met(jnp.zeros((1, 2)))
  np.testing.assert_allclose(gradient, [[0, 0]], atol=1e-6)


def test_regressions_dex_and_ranking_follow_their_formulas():
  rng = np.random.default_rng(0)
  labels, y, z = np.arange(5.0), np.array([0.2, 3.5, 4.0]), rng.normal(size=(3, 5))
  log_q = z - np.log(np.exp(z).sum(1, keepdims=True))
  assert_close(losses.dex_loss(z, y, labels), -log_q[np.arange(3), [0, 3, 4]], 1e-5)
  code = (y[:, None] > labels[:-1]).astype(float)
  s = 1 / (1 + np.exp(-z[:, :4]))
  bce = -(code * np.log(s) + (1 - code) * np.log(1 - s)).mean(1)
  assert_close(losses.ranking_loss(z[:, :4], y, labels), bce, 1e-5)
  assert_close(losses.ranking_loss(z[:, :4], y, labels, 'mse'), ((s - code) ** 2).mean(1), 1e-5)
  error = np.array([0.4, -2.0])
  for kind, expected in (('l1', [0.4, 2]), ('smooth_l1', [0.08, 1.5]), ('l2', [0.16, 4])):
    assert_close(losses.regression_loss(error, np.zeros(2), kind), expected, 1e-6)
  unit = losses.to_unit_range(y, labels)
  assert_close(unit, y / 2 - 1, 1e-6)
  assert_close(losses.from_unit_range(unit, labels), y, 1e-6)


def test_half_precision_is_summed_in_float32():
  rng = np.random.default_rng(0)
  z, y, labels = rng.normal(size=(4, 101)), rng.uniform(0, 100, 4), np.arange(101.0)
  found = losses.dldl_v2_loss(jnp.asarray(z, jnp.bfloat16), y, 2.0, labels)
  exact = losses.dldl_v2_loss(jnp.asarray(z, jnp.bfloat16).astype(jnp.float32), y, 2.0, labels)
  assert found.value.dtype == jnp.float32
  assert_close(found.value, exact.value, 1e-6)


GRID = jnp.arange(5.0)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: losses.gaussian_label_distribution(jnp.array([1.0, 4.5]), 1.0, GRID),
      'position 1: 4.5',
    ),
    (lambda: losses.gaussian_label_distribution(jnp.array([np.nan]), 1.0, GRID), 'not finite'),
    (
      lambda: losses.gaussian_label_distribution(jnp.ones((1, 1)), 1.0, GRID),
      r'y must be \[batch\]',
    ),
    (lambda: losses.gaussian_label_distribution(jnp.ones(2), -1.0, GRID), 'sigma must not be neg'),
    (lambda: losses.gaussian_label_distribution(jnp.ones(2), np.nan, GRID), 'NaN'),
    (lambda: losses.gaussian_label_distribution(jnp.ones(2), jnp.ones(3), GRID), 'sigma must be'),
    (
      lambda: losses.gaussian_label_distribution(jnp.ones(1), 1.0, jnp.ones(3)),
      'increase strictly',
    ),
    (lambda: losses.gaussian_label_distribution(jnp.ones(1), 1.0, jnp.ones(1)), 'at least two'),
    (lambda: losses.gaussian_label_distribution(jnp.ones(1), 1.0, GRID, 'cut'), "outside is 'cut'"),
    (lambda: losses.dldl_v2_loss(jnp.ones((1, 4)), jnp.ones(1), 1.0, GRID), r'expected \(1, 5\)'),
    (lambda: losses.dldl_v2_loss(jnp.ones((1, 5)), jnp.ones(1), 1.0, GRID, -1.0), 'weight'),
    (
      lambda: losses.dldl_v2_loss(jnp.ones((1, 5)), jnp.ones(1), 1.0, GRID, kl_reduction='sum'),
      "kl_reduction is 'sum'",
    ),
    (
      lambda: losses.dldl_v2_loss(jnp.ones((1, 5)), jnp.ones(1), 1.0, GRID, regression='l0'),
      "kind is 'l0'",
    ),
    (lambda: losses.dex_loss(jnp.ones((1, 4)), jnp.ones(1), GRID), r'labels must be \[4\]'),
    (lambda: losses.ranking_loss(jnp.ones((1, 5)), jnp.ones(1), GRID), r'expected \(1, 4\)'),
    (lambda: losses.ranking_loss(jnp.ones((1, 4)), jnp.ones(1), GRID, 'ce'), "kind is 'ce'"),
    (lambda: losses.rank_predict(jnp.ones(3), GRID), r'labels must be \[4\]'),
    (lambda: losses.label_expectation(jnp.ones(4), GRID), r'labels must be \[4\]'),
    (lambda: losses.regression_loss(jnp.ones(4), jnp.ones(3)), 'one shape'),
  ],
)
def test_impossible_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_values_outside_are_clipped_where_that_is_asked_for():
  y = jnp.array([-3.0, 4.5])
  found = losses.dldl_v2_loss(jnp.zeros((2, 5)), y, 1.0, GRID, outside='clip')
  ends = losses.dldl_v2_loss(jnp.zeros((2, 5)), jnp.array([0.0, 4.0]), 1.0, GRID)
  for a, b in zip(found, ends, strict=True):
    np.testing.assert_array_equal(a, b)
