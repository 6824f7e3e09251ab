import functools

import compilations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close
from sklearn.linear_model import LogisticRegression

from jaxlab import data, evaluation
from jaxlab.evaluation import linear_probe


def clusters(seed, count=70, dim=6, num_classes=3, spread=0.7):
  rng = np.random.default_rng(seed)
  centers = np.random.default_rng(99).normal(size=(num_classes, dim))
  labels = rng.integers(0, num_classes, count)
  return (centers[labels] + spread * rng.normal(size=(count, dim))).astype(np.float32), labels


BANK, LABELS = clusters(0)
QUERIES, QUERY_LABELS = clusters(1)
KEY = jax.random.key(0)

sgd = functools.partial(
  evaluation.linear_probe_sgd,
  num_classes=3,
  epochs=20,
  batch_size=16,
  milestones=(12, 16),
  learning_rate=1.0,
)
lars = functools.partial(
  evaluation.linear_probe_lars,
  num_classes=3,
  epochs=20,
  batch_size=16,
  learning_rate=8.0,
  trust_coefficient=0.05,
)
logistic = functools.partial(evaluation.logistic_probe, num_classes=3)


def test_logistic_probe_reaches_the_optimum():
  probe = logistic(BANK, LABELS, l2=1e-2)
  standardized = (BANK - BANK.mean(0)) / BANK.std(0)
  # scikit-learn minimizes C * sum(cross-entropy) + |kernel|^2 / 2.
  reference = LogisticRegression(C=1 / (2 * 1e-2 * len(LABELS)), tol=1e-8, max_iter=10000)
  reference.fit(standardized, LABELS)
  expected = reference.decision_function((QUERIES - BANK.mean(0)) / BANK.std(0))
  logits = evaluation.probe_logits(probe, QUERIES)
  logits = logits - logits.mean(1, keepdims=True)
  assert_close(logits, expected - expected.mean(1, keepdims=True), 1e-2)


def test_logistic_probe_ignores_scales_shifts_and_constant_dimensions():
  plain = evaluation.probe_logits(logistic(BANK, LABELS), QUERIES)
  scales = np.array([1e-3, 1, 10, 100, 1, 1], np.float32)
  probe = logistic(scales * BANK + 1, LABELS)
  assert_close(evaluation.probe_logits(probe, scales * QUERIES + 1), plain, 1e-2)
  constant = np.full((70, 1), 0.1, np.float32)
  probe = logistic(np.hstack([BANK, constant]), LABELS)
  assert_close(evaluation.probe_logits(probe, np.hstack([QUERIES, constant])), plain, 1e-3)
  far = evaluation.probe_logits(probe, np.hstack([QUERIES, constant + 9]))
  assert_close(far, plain, 1e-3)


def test_calls_of_equal_shape_share_one_compilation():
  linear_probe._logistic.clear_cache()
  linear_probe._minibatch.clear_cache()
  with compilations.counted() as count:
    logistic(BANK, LABELS)
    logistic(QUERIES, QUERY_LABELS, l2=1e-3, learning_rate=0.1)
    sgd(KEY, BANK, LABELS)
    sgd(jax.random.key(1), QUERIES, QUERY_LABELS, learning_rate=0.5)
  assert (count['_logistic'], count['_minibatch']) == (1, 1)


def test_logistic_probe_maps_over_feature_sets():
  sets = np.stack([BANK, QUERIES])
  mapped = jax.vmap(logistic)(sets, np.stack([LABELS, QUERY_LABELS]))
  for index, labels in enumerate((LABELS, QUERY_LABELS)):
    assert_close(mapped.kernel[index], logistic(sets[index], labels).kernel, 1e-3)


@pytest.mark.parametrize('train', [sgd, lars])
def test_minibatch_probes_learn_and_repeat_with_their_key(train):
  probe = train(KEY, BANK, LABELS)
  assert evaluation.probe_accuracy(probe, QUERIES, QUERY_LABELS) > 0.8
  again = train(KEY, BANK, LABELS)
  jax.tree.map(np.testing.assert_array_equal, probe, again)
  other = train(jax.random.key(1), BANK, LABELS)
  assert np.any(other.kernel != probe.kernel)


def descend(features, kernel, rates, kernel_scale=lambda kernel, gradient: 1.0):
  """Full-batch gradient descent on the mean cross-entropy of LABELS, from bias 0."""
  kernel, bias = np.asarray(kernel, float), np.zeros(3)
  for rate in rates:
    error = np.asarray(jax.nn.softmax(features @ kernel + bias, axis=-1))
    error = (error - np.eye(3)[LABELS]) / len(LABELS)
    gradient = features.T @ error
    kernel = kernel - rate * kernel_scale(kernel, gradient) * gradient
    bias = bias - rate * error.sum(0)
  return kernel, bias


@pytest.mark.parametrize(
  ('milestones', 'factors'),
  [((), [1, 1, 1]), ((1, 2), [1, 0.1, 0.01]), (None, [1, 0.75, 0.25])],
)
def test_sgd_descends_the_mean_loss_at_the_scheduled_rates(milestones, factors):
  train = functools.partial(
    sgd, KEY, BANK, LABELS, epochs=3, batch_size=70, momentum=0.0, milestones=milestones
  )
  start = train(learning_rate=0.0)
  assert 0.005 < np.std(start.kernel) < 0.02
  assert not np.any(start.bias)
  kernel, bias = descend(BANK, start.kernel, 0.5 * np.array(factors))
  probe = train(learning_rate=0.5)
  assert_close(probe.kernel, kernel, 1e-4)
  assert_close(probe.bias, bias, 1e-4)


@pytest.mark.parametrize(
  ('warmup_epochs', 'factors'), [(0, [1, 0.75, 0.25]), (1, [0, 1, 0.5]), (2, [0, 0.5, 1])]
)
def test_lars_scales_the_kernel_by_its_trust_ratio_and_standardizes(warmup_epochs, factors):
  train = functools.partial(
    lars, KEY, BANK, LABELS, epochs=3, batch_size=70, momentum=0.0, trust_coefficient=0.01,
    warmup_epochs=warmup_epochs, standardize=True,
  )  # fmt: skip
  start = train(learning_rate=0.0)
  kernel, bias = descend(
    (BANK - BANK.mean(0)) / BANK.std(0),
    start.kernel,
    2.0 * 70 / 256 * np.array(factors),
    lambda w, g: 0.01 * np.linalg.norm(w) / np.linalg.norm(g),
  )
  probe = train(learning_rate=2.0)
  assert_close(probe.mean, BANK.mean(0), 1e-5)
  assert_close(probe.scale, 1 / BANK.std(0), 1e-5)
  assert_close(probe.kernel, kernel, 1e-5)
  assert_close(probe.bias, bias, 1e-4)


def test_the_remainder_of_an_epoch_is_a_smaller_batch():
  features, labels = BANK[:3], LABELS[:3]
  start = sgd(KEY, features, labels, epochs=1, batch_size=2, learning_rate=0.0)
  after = sgd(KEY, features, labels, epochs=1, batch_size=2, learning_rate=0.5, momentum=0.0)

  def steps(order):
    kernel, bias = np.asarray(start.kernel), np.zeros(3)
    for rows in (list(order[:2]), list(order[2:])):
      error = np.asarray(jax.nn.softmax(features[rows] @ kernel + bias, axis=-1))
      error = (error - np.eye(3)[labels[rows]]) / len(rows)
      kernel, bias = kernel - 0.5 * features[rows].T @ error, bias - 0.5 * error.sum(0)
    return kernel

  candidates = [steps(order) for order in ((0, 1, 2), (0, 2, 1), (1, 2, 0))]
  assert min(np.max(np.abs(after.kernel - kernel)) for kernel in candidates) < 1e-5


def test_probes_train_in_float32_on_bfloat16_features():
  probe = logistic(BANK.astype(jnp.bfloat16), LABELS)
  assert probe.kernel.dtype == jnp.float32
  assert evaluation.probe_accuracy(probe, QUERIES, QUERY_LABELS) > 0.8


PROBE = evaluation.Probe(np.ones((6, 3)), np.zeros(3), np.zeros(6), np.ones(6))


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: logistic(BANK, LABELS + 1), r'labels must be in \[0, 3\)'),
    (lambda: logistic(BANK, LABELS[:5]), '70 rows for 5 labels'),
    (lambda: logistic(BANK, LABELS / 1.0), 'must be integers'),
    (lambda: logistic(BANK, LABELS[:, None]), r'labels must be \[examples\]'),
    (lambda: logistic(BANK, LABELS, steps=0), 'steps must be positive'),
    (lambda: logistic(BANK[0], LABELS), 'features must be'),
    (lambda: sgd(KEY, BANK, LABELS, epochs=0), 'epochs must be positive'),
    (lambda: sgd(KEY, BANK, LABELS, batch_size=0), 'batch_size must be positive'),
    (lambda: lars(KEY, BANK, LABELS - 1), 'labels must be in'),
    (lambda: lars(KEY, BANK, LABELS, warmup_epochs=20), 'warmup_epochs must be in'),
    (lambda: evaluation.probe_accuracy(PROBE, BANK[:, :4], LABELS), 'dimension 6'),
    (lambda: evaluation.probe_accuracy(PROBE, BANK, LABELS + 5), 'labels must be in'),
  ],
)
def test_bad_arguments_raise(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_features_that_are_not_finite_are_an_error_or_nan():
  spoiled = BANK.copy()
  spoiled[5, 2] = np.nan
  for fit in (logistic, functools.partial(sgd, KEY), functools.partial(lars, KEY)):
    with pytest.raises(ValueError, match=r'features .* not finite, the first is row 5'):
      fit(spoiled, LABELS)
    probe = jax.jit(fit)(spoiled, LABELS)
    assert np.isnan(jax.jit(evaluation.probe_accuracy)(probe, BANK, LABELS))


def test_logistic_probe_converges_by_default_and_says_where_it_did_not():
  train, test = (data.Digits(split).arrays for split in ('train', 'test'))
  (x, y), (queries, labels) = (
    (split['image'].reshape(len(split['image']), -1).astype(np.float32), split['label'])
    for split in (train, test)
  )
  probe = evaluation.logistic_probe(x, y, num_classes=10)
  assert probe.converged
  deviation = np.where(x.std(0) > 0, x.std(0), 1)
  reference = LogisticRegression(C=1 / (2 * 1e-4 * len(y)), tol=1e-6, max_iter=10000)
  reference.fit((x - x.mean(0)) / deviation, y)
  expected = reference.score((queries - x.mean(0)) / deviation, labels)
  assert abs(evaluation.probe_accuracy(probe, queries, labels) - expected) <= 0.002
  assert not evaluation.logistic_probe(x, y, num_classes=10, steps=20).converged
  with pytest.raises(ValueError, match='recipe of fixed length'):
    sgd(KEY, BANK, LABELS).converged  # noqa: B018
