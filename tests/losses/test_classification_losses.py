import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.losses.classification import (
  focal_loss,
  label_smoothing_cross_entropy,
  multi_label_bce,
  sigmoid_focal_loss,
  weighted_cross_entropy,
)


@pytest.fixture(params=['float32', 'float64'])
def rtol(request):
  """Runs a test in both precisions; the tolerance of each."""
  with jax.enable_x64(request.param == 'float64'):
    yield {'float32': 2e-6, 'float64': 1e-9}[request.param]


def batch(seed=0, size=6, num_classes=5):
  rng = np.random.default_rng(seed)
  logits = (3 * rng.standard_normal((size, num_classes))).astype(np.float32)
  return logits, rng.integers(0, num_classes, size)


def mean_and_grad(loss, **options):
  return jax.jit(jax.value_and_grad(lambda *args: jnp.mean(loss(*args, **options))))


@golden('long_tail_protocols', 'focal_loss')
def test_focal_loss_and_gradient_agree_with_reference(vectors, rtol):
  step = mean_and_grad(focal_loss, gamma=vectors.param('gamma'))
  value, grad = step(vectors['in_logits'], vectors['in_labels'])
  assert_close(value, vectors['out_loss'], rtol)
  assert_close(grad, vectors['grad_logits'], rtol)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_label_smoothing_is_the_cross_entropy_to_smoothed_labels(seed, smoothing):
  logits, labels = batch(seed)
  targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[1]), smoothing)
  expected = optax.softmax_cross_entropy(logits, targets)
  assert_close(label_smoothing_cross_entropy(logits, labels, smoothing), expected, 1e-5)


def test_smoothing_may_differ_from_example_to_example():
  logits, labels = batch()
  smoothing = np.linspace(0, 1, len(labels))
  rows = [
    label_smoothing_cross_entropy(logits[i], labels[i], smoothing[i]) for i in range(len(labels))
  ]
  assert_close(label_smoothing_cross_entropy(logits, labels, smoothing), np.stack(rows), 1e-6)


def test_weighted_mean_divides_by_the_weights_and_not_by_the_batch():
  logits, labels = batch()
  weights = np.array([0.0, 0.5, 1, 3, 7], np.float32)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  value = weighted_cross_entropy(logits, labels, weights)
  assert_close(value, np.average(losses, weights=weights[labels]), 1e-6)
  assert_close(weighted_cross_entropy(logits, labels, 10 * weights), value, 1e-6)
  assert_close(weighted_cross_entropy(logits, labels, np.ones(5)), np.mean(losses), 1e-6)


def test_batch_without_weight_has_loss_and_gradient_zero():
  logits, labels = batch()
  weights = np.ones(6, np.float32)
  weights[:5] = 0
  logits = np.pad(logits, [(0, 0), (0, 1)])
  value, grad = mean_and_grad(weighted_cross_entropy)(logits, labels, weights)
  assert value == 0
  np.testing.assert_array_equal(grad, 0)


def test_focal_loss_without_gamma_is_the_cross_entropy():
  logits, labels = batch()
  expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  assert_close(focal_loss(logits, labels, 0), expected, 1e-6)


def test_focal_weight_multiplies_outside_or_inside_of_the_probability():
  logits, labels = batch()
  weights = np.array([0.0, 0.5, 1, 3, 7], np.float32)
  nll = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, labels), np.float64)
  w = weights[labels]
  outside = focal_loss(logits, labels, 2.0, weights)
  inside = focal_loss(logits, labels, 2.0, weights, weight_inside=True)
  assert_close(outside, w * (1 - np.exp(-nll)) ** 2 * nll, 1e-5)
  assert_close(inside, (1 - np.exp(-w * nll)) ** 2 * w * nll, 1e-5)
  assert np.max(np.abs(outside - inside)) > 0.1


@pytest.mark.parametrize('gamma', [0.0, 0.5, 1.0, 3.0])
def test_focal_gradient_is_finite_for_perfect_and_hopeless_examples(gamma):
  logits = np.array([[200.0, 0], [0, 200.0], [20.0, 0], [0, 0]], np.float32)
  value, grad = mean_and_grad(focal_loss, gamma=gamma)(logits, np.zeros(4, np.int32))
  assert np.isfinite(value)
  assert np.all(np.isfinite(grad))
  np.testing.assert_array_equal(grad[0], 0)
  assert np.all(grad[1] != 0)


LOSSES = {
  'label_smoothing': label_smoothing_cross_entropy,
  'weighted': functools.partial(weighted_cross_entropy, class_weights=np.arange(1, 6)),
  'focal': functools.partial(focal_loss, class_weights=np.arange(1, 6), weight_inside=True),
}


@pytest.mark.parametrize('name', LOSSES)
def test_losses_agree_compiled_under_vmap_and_in_bfloat16(name):
  loss = LOSSES[name]
  logits, labels = zip(*[batch(seed) for seed in range(3)])
  logits, labels = np.stack(logits), np.stack(labels)
  loop = np.stack([loss(a, b) for a, b in zip(logits, labels)])
  assert_close(jax.jit(jax.vmap(loss))(logits, labels), loop, 1e-6)
  half = jax.jit(loss)(logits[0].astype(jnp.bfloat16), labels[0])
  assert half.dtype == jnp.float32
  assert_close(half, loop[0], 2e-2)


@pytest.mark.parametrize('name', LOSSES)
def test_non_finite_logits_are_not_hidden(name):
  logits, labels = batch()
  logits[2] = np.nan
  assert np.isnan(jnp.mean(LOSSES[name](logits, labels)))


def test_values_are_not_checked_under_tracing():
  logits, labels = batch()
  assert jax.jit(label_smoothing_cross_entropy)(logits, labels, 0.1).shape == labels.shape
  assert jax.jit(focal_loss)(logits, labels, 1.0).shape == labels.shape


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda z, y: focal_loss(z, y[:-1]), r'labels \[\.\.\.\], not empty; got \(6, 5\), \(5,\)'),
    (lambda z, y: focal_loss(z[:0], y[:0]), 'not empty'),
    (lambda z, y: focal_loss(z, y.astype(float)), 'labels must be integers, got float'),
    (lambda z, y: focal_loss(z, np.full(6, 5)), r'labels must be in \[0, 5\), got values from 5'),
    (lambda z, y: focal_loss(z, np.full(6, -1)), r'labels must be in \[0, 5\)'),
    (lambda z, y: focal_loss(z, y, -0.5), 'gamma must not be negative, got -0.5'),
    (lambda z, y: focal_loss(z, y, 1.0, np.ones(4)), r'class_weights must be \(5,\)'),
    (lambda z, y: weighted_cross_entropy(z, y, np.ones((1, 5))), r'class_weights must be \(5,\)'),
    (lambda z, y: weighted_cross_entropy(z, y, -np.ones(5)), 'class_weights must not be negative'),
    (lambda z, y: weighted_cross_entropy(z, y[:-1], np.ones(5)), 'Expected logits'),
    (lambda z, y: label_smoothing_cross_entropy(z, y + 5), r'labels must be in \[0, 5\)'),
    (lambda z, y: label_smoothing_cross_entropy(z, y, 1.1), r'smoothing must be in \[0, 1\]'),
    (lambda z, y: label_smoothing_cross_entropy(z, y, np.nan), r'smoothing must be in \[0, 1\]'),
    (lambda z, y: label_smoothing_cross_entropy(z, y, np.zeros(5)), r'smoothing must be a scalar'),
  ],
)
def test_bad_arguments_raise(call, message):
  with pytest.raises(ValueError, match=message):
    call(*batch())


@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (0.0, None), (0.5, 0.75)])
def test_sigmoid_focal_loss_is_the_sum_over_classes_in_float64(gamma, alpha):
  logits, labels = batch()
  logits[0, 1] = -40
  expected = []
  for row, label in zip(np.float64(logits), labels):
    total = 0
    for c, logit in enumerate(row):
      p = 1 / (1 + np.exp(-logit if c == label else logit))
      weight = 1 if alpha is None else alpha if c == label else 1 - alpha
      total -= weight * (1 - p) ** gamma * np.log(p)
    expected.append(total)
  loss = functools.partial(sigmoid_focal_loss, gamma=gamma, alpha=alpha)
  assert_close(jax.jit(loss)(logits, labels), np.stack(expected), 1e-5)
  gradient = jax.grad(lambda x: jnp.sum(loss(x, labels)))(logits)
  step = 1e-3 * np.float32(np.arange(30).reshape(6, 5) == 13)
  slope = (jnp.sum(loss(logits + step, labels)) - jnp.sum(loss(logits - step, labels))) / 2e-3
  assert_close(gradient.ravel()[13], slope, 1e-2, 1e-3)


def test_sigmoid_focal_loss_of_masked_classes_and_unknown_labels():
  logits, labels = batch()
  masked = logits.copy()
  masked[:, 2] = -np.inf
  labels = np.where(labels == 2, 0, labels)
  rest, order = np.delete(logits, 2, axis=1), np.array([0, 1, -1, 2, 3])
  expected = sigmoid_focal_loss(rest, order[labels])
  assert_close(sigmoid_focal_loss(masked, labels), expected, 1e-6)
  gradient = jax.grad(lambda x: jnp.sum(sigmoid_focal_loss(x, labels)))(masked)
  assert np.isfinite(gradient).all() and not gradient[:, 2].any()
  assert np.isposinf(sigmoid_focal_loss(masked, np.full(6, 2))).all()
  traced = jax.jit(sigmoid_focal_loss)(logits, np.array([0, -1, 5, 1, 2, 3]))
  np.testing.assert_array_equal(np.isnan(traced), [False, True, True, False, False, False])
  with pytest.raises(ValueError, match=r'alpha must be in \[0, 1\]'):
    sigmoid_focal_loss(logits, labels, alpha=2.0)
  with pytest.raises(ValueError, match='gamma must not be negative'):
    sigmoid_focal_loss(logits, labels, gamma=-1.0)


def test_several_labels_are_binary_cross_entropies_of_classes_that_are_not_masked():
  rng = np.random.default_rng(0)
  logits, labels = 2 * rng.normal(size=(4, 5)), rng.random((4, 5)) < 0.4
  share = 1 / (1 + np.exp(-logits))
  terms = -np.where(labels, np.log(share), np.log(1 - share))
  assert_close(multi_label_bce(logits, labels), terms.mean(1), 1e-5)
  labels[:, 2], masked = False, logits.copy()
  masked[:, 2] = -np.inf
  value, grad = mean_and_grad(multi_label_bce)(masked, labels.astype(int))
  rest = [0, 1, 3, 4]
  expected, rest_grad = mean_and_grad(multi_label_bce)(logits[:, rest], labels[:, rest].astype(int))
  assert_close(value, expected, 1e-5)
  assert_close(grad[:, rest], rest_grad, 1e-5)
  assert not np.any(grad[:, 2])
  labels[1, 2] = True
  assert np.isinf(multi_label_bce(masked, labels)).tolist() == [False, True, False, False]
  # Labels that are traced cannot raise.
  soft = jax.jit(multi_label_bce)(logits, jnp.asarray(labels, jnp.float32).at[2, 0].set(0.5))
  assert np.isnan(soft).tolist() == [False, False, True, False]


def test_labels_of_several_classes_are_0_or_1():
  for labels, message in ((np.full((2, 3), 0.5), '0 or 1'), (np.ones(2), 'num_classes')):
    with pytest.raises(ValueError, match=message):
      multi_label_bce(np.zeros((2, 3)), labels)
