import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from jaxlab import evaluation


def examples(seed, count=80, dim=5, num_classes=4):
  rng = np.random.default_rng(seed)
  features = rng.normal(size=(count, dim)) * [1, 10, 0.1, 3, 1] + 2
  directions = np.random.default_rng(7).normal(size=(dim, num_classes)) / [
    [1],
    [10],
    [0.1],
    [3],
    [1],
  ]
  logits = (features - 2) @ directions + rng.normal(size=(count, num_classes)) - 0.5
  return features.astype(np.float32), (logits > 0).astype(np.float32)


@pytest.mark.parametrize('levels', [None, 3])
def test_average_precision_is_that_of_scikit_learn(levels):
  rng = np.random.default_rng(0)
  scores, (_, labels) = rng.normal(size=(80, 4)), examples(0)
  if levels:  # ties across positives and negatives
    scores = np.round(levels * scores) / levels
  expected = [average_precision_score(labels[:, c], scores[:, c]) for c in range(4)]
  found = evaluation.average_precision(scores, labels)
  assert_close(found, expected, 1e-6)
  assert_close(evaluation.mean_average_precision(scores, labels), np.mean(expected), 1e-6)
  assert_close(jax.jit(evaluation.average_precision)(scores, labels), found, 1e-6)


def test_classes_without_positives_are_left_out_of_the_mean():
  scores, labels = jnp.array([[0.9, 0.3], [0.1, 0.2]]), jnp.array([[0, 0], [1, 0]])
  assert np.isnan(evaluation.average_precision(scores, labels)[1])
  assert_close(evaluation.mean_average_precision(scores, labels), 0.5, 1e-6)
  # A score that is not finite is never turned into a precision.
  broken = jax.jit(evaluation.mean_average_precision)(scores.at[0, 0].set(jnp.nan), labels)
  assert np.isnan(broken)


def test_entries_that_do_not_count_are_as_if_they_were_not_there():
  rng = np.random.default_rng(5)
  (_, labels), where = examples(0), rng.random((80, 4)) < 0.6
  scores = rng.normal(size=(80, 4))
  expected = [
    average_precision_score(labels[rows, c], scores[rows, c]) for c, rows in enumerate(where.T)
  ]
  assert_close(evaluation.average_precision(scores, labels, where), expected, 1e-6)
  assert_close(evaluation.mean_average_precision(scores, labels, where), np.mean(expected), 1e-6)
  with pytest.raises(ValueError, match='where must be'):
    evaluation.average_precision(scores, labels, where[:, :2])


@golden('csra', 'metrics')
def test_metrics_agree_with_official_code(vectors):
  protocol = vectors.path.stem.split('_')[1]
  arrays = vectors['in_scores'], vectors['in_targets']
  found = evaluation.multi_label_metrics(*arrays, protocol)
  assert_close(found.average_precision, vectors['out_average_precision'], 5e-6)
  assert_close(found.mean_average_precision, vectors['out_map'], 5e-6)
  names = [
    f'{kind}_{name}' for kind in ('overall', 'class') for name in ('precision', 'recall', 'f1')
  ]
  for name in names:
    assert_close(getattr(found, name), vectors[f'out_{name}'], 5e-6)
  best = evaluation.multi_label_metrics(*arrays, protocol, top=3)
  top = [getattr(best, name) for name in names]
  assert_close(top, vectors['out_top3_op_or_of1_cp_cr_cf1'], 5e-6)
  assert_close(best.average_precision, found.average_precision, 1e-7)
  jitted = jax.jit(evaluation.multi_label_metrics, static_argnames=('protocol', 'top'))
  for a, b in zip(jitted(*arrays, protocol=protocol, top=3), best, strict=True):
    assert_close(a, b, 1e-6)


def test_a_class_without_positives_is_left_out_with_a_warning():
  scores, targets = np.array([[0.9, 0.8], [0.6, 0.1]]), np.array([[1, 0], [0, 0]])
  with pytest.warns(UserWarning, match=r'classes \[1\] have no positives'):
    found = evaluation.multi_label_metrics(scores, targets)
  assert found.mean_average_precision == 1 and found.class_recall == 1
  assert found.class_precision == 0.25 and np.isnan(found.average_precision[1])
  with pytest.warns(UserWarning):  # nothing is predicted: no division by 0
    none = evaluation.multi_label_metrics(0.1 * scores, targets)
  assert none.overall_precision == none.overall_f1 == none.class_f1 == 0


def test_a_probe_of_several_labels_is_a_logistic_regression_for_each():
  (features, labels), (queries, query_labels) = examples(1), examples(2)
  probe = evaluation.multi_label_probe(features, labels, l2=1e-2)
  mean, deviation = features.mean(0, dtype=float), features.std(0, dtype=float)
  expected = []
  for own in labels.T:
    # scikit-learn minimizes C * sum(cross-entropy) + |kernel|^2 / 2.
    reference = LogisticRegression(C=1 / (2 * 1e-2 * len(own)), tol=1e-8, max_iter=10000)
    reference.fit((features - mean) / deviation, own)
    expected.append(reference.decision_function((queries - mean) / deviation))
  found = evaluation.probe_logits(probe, queries)
  assert_close(found, np.transpose(expected), 1e-2)
  assert probe.converged
  assert evaluation.mean_average_precision(found, query_labels) > 0.8


def test_precision_counts_what_shares_a_class_with_its_query():
  rng = np.random.default_rng(3)
  retrieved = rng.random((6, 9)) < 0.4
  retrieved[:, 0] = True
  labels, bank = rng.random((6, 4)) < 0.3, rng.random((9, 4)) < 0.3
  shares = [
    np.mean([(labels[q] & bank[i]).any() for i in np.flatnonzero(retrieved[q])]) for q in range(6)
  ]
  found = evaluation.shared_label_precision(*map(jnp.asarray, (retrieved, labels, bank)))
  assert_close(found, np.mean(shares), 1e-6)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: evaluation.average_precision(np.ones((3, 2)), np.ones((3, 1))), 'num_classes'),
    (lambda: evaluation.average_precision(np.ones((3, 2)), 2 * np.ones((3, 2))), '0 or 1'),
    (lambda: evaluation.average_precision(np.full((3, 2), np.nan), np.ones((3, 2))), 'finite'),
    (lambda: evaluation.multi_label_metrics(np.ones((3, 2)), np.ones((3, 2)), 'voc'), "is 'voc'"),
    (lambda: evaluation.multi_label_metrics(np.ones((3, 2)), -np.ones((3, 2))), r'of \(0, 1\)'),
    (
      lambda: evaluation.multi_label_metrics(np.ones((3, 2)), 99 * np.ones((3, 2)), 'voc07'),
      r'of \(-1, 0, 1\); at \[0, 0\] is 99',
    ),
    (lambda: evaluation.multi_label_metrics(np.full((3, 2), 3), np.ones((3, 2))), 'scores must be'),
    (lambda: evaluation.multi_label_metrics(np.ones((3, 2)), np.ones((3, 2)), top=3), 'top is 3'),
    (lambda: evaluation.multi_label_metrics(np.ones((3, 2)), np.ones((3, 1))), 'num_classes'),
    (lambda: evaluation.multi_label_probe(np.ones((3, 2)), np.ones(3)), 'labels must be'),
    (lambda: evaluation.multi_label_probe(np.ones((3, 2)), np.ones((4, 2))), '4 labels'),
    (lambda: evaluation.multi_label_probe(np.ones((3, 2)), np.ones((3, 2)), steps=0), 'steps'),
    (
      lambda: evaluation.shared_label_precision(np.ones((2, 3)), np.ones((2, 4)), np.ones((3, 5))),
      'bank_labels',
    ),
  ],
)
def test_impossible_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
