import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.data.protocols.long_tail import shot_groups
from jaxlab.evaluation.classification import confusion_matrix, per_class_recall
from jaxlab.evaluation.recalls import (
  confusion_metrics,
  geometric_mean,
  group_recalls,
  harmonic_mean,
  imbalanced_metrics,
  lowest_recall,
  macro_f1,
  recall_metrics,
)

both_precisions = pytest.mark.parametrize('x64', [True, False])


@both_precisions
@golden('gml', 'recall_metrics')
def test_means_of_recalls_agree_with_reference(vectors, x64):
  with jax.enable_x64(x64):
    rtol = 1e-9 if x64 else 2e-6
    metrics = recall_metrics(
      vectors['in_predictions'],
      vectors['in_labels'],
      vectors.param('num_classes'),
      zero_replacement=vectors.param('zero_replacement'),
    )
    expected = {
      'mean': 'mean_recall',
      'harmonic': 'harmonic_mean',
      'geometric': 'geometric_mean',
      'lowest': 'lowest_recall',
    }
    for ours, theirs in expected.items():
      assert_close(metrics[ours], vectors[f'out_{theirs}'], rtol)
    recalls = vectors['out_per_class_recall']
    confusion = confusion_matrix(vectors['in_predictions'], vectors['in_labels'], recalls.size)
    assert_close(per_class_recall(jnp.asarray(confusion, float)), recalls, rtol)
    replacement = vectors.param('zero_replacement')
    for mean, theirs in ((harmonic_mean, 'harmonic_mean'), (geometric_mean, 'geometric_mean')):
      compiled = jax.jit(mean, static_argnums=1)
      assert_close(compiled(recalls, replacement), vectors[f'out_{theirs}'], rtol)
    assert_close(jax.jit(lowest_recall)(recalls), vectors['out_lowest_recall'], rtol)
    correct = vectors['in_predictions'] == vectors['in_labels']
    assert_close(metrics['accuracy'], correct.mean(), rtol)


@both_precisions
@golden('long_tail_protocols', 'shot_accuracy')
def test_group_accuracies_agree_with_reference(vectors, x64):
  counts = vectors['in_train_counts']
  groups = shot_groups(counts, vectors.param('many_threshold'), vectors.param('few_threshold'))
  with jax.enable_x64(x64):
    metrics = recall_metrics(vectors['in_predictions'], vectors['in_labels'], len(counts), groups)
  for ours, theirs in (('accuracy', 'overall'), *((name, name) for name in groups)):
    assert_close(metrics[ours], vectors[f'out_{theirs}'], 1e-9 if x64 else 2e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.001, 1), min_size=5, max_size=5))
def test_lowest_harmonic_geometric_arithmetic_are_in_this_order(recalls):
  recalls = np.array(recalls)
  means = [float(f(recalls)) for f in (lowest_recall, harmonic_mean, geometric_mean, jnp.mean)]
  assert all(a <= b * (1 + 1e-5) for a, b in itertools.pairwise(means))
  equal = np.full(3, recalls[0])
  for f in (lowest_recall, harmonic_mean, geometric_mean):
    assert_close(f(equal), recalls[0], 1e-5)


def test_zeros_are_replaced_in_the_means_but_not_in_the_lowest():
  recalls = np.array([0.0, 1.0])
  assert_close(harmonic_mean(recalls), 2 / 1001, 1e-6)
  assert_close(geometric_mean(recalls, 1e-2), 0.1, 1e-6)
  assert float(lowest_recall(recalls)) == 0


def test_means_over_the_last_axis_are_those_of_each_row():
  recalls = np.random.default_rng(0).uniform(size=(3, 5)).astype(np.float32)
  groups = {'a': np.arange(5) < 2}
  for f in (harmonic_mean, geometric_mean, lowest_recall, lambda r: group_recalls(r, groups)['a']):
    assert_close(f(recalls), [float(f(row)) for row in recalls], 1e-6)
    assert_close(jax.jit(jax.vmap(f))(recalls), f(recalls), 1e-6)


def test_gradients_of_the_means_are_finite_at_zero_recall():
  for mean in (harmonic_mean, geometric_mean):
    assert np.isfinite(jax.jit(jax.grad(mean))(np.array([0.0, 0.5, 1.0]))).all()


def test_accuracy_weighs_examples_and_mean_weighs_classes():
  labels = np.repeat([0, 1, 2], [6, 2, 2])
  predictions = np.array([0] * 6 + [0, 1, 0, 0])
  groups = {'head': np.array([1, 0, 0], bool), 'rest': np.array([0, 1, 1], bool)}
  groups['none'] = np.zeros(3, bool)
  metrics = recall_metrics(predictions, labels, 3, groups)
  assert all(type(value) is float for value in metrics.values())
  assert np.isnan(metrics.pop('none'))
  expected = {
    'accuracy': 0.7,
    'mean': 0.5,
    'harmonic': 3 / 1003,
    'geometric': (0.5e-3) ** (1 / 3),
    'lowest': 0.0,
    'head': 1.0,
    'rest': 0.25,
  }
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    assert_close(metrics[name], value, 1e-6)


def test_metrics_of_a_confusion_matrix_are_those_of_its_examples():
  rng = np.random.default_rng(0)
  predictions, labels = rng.integers(0, 4, 40), np.arange(40) % 4
  confusion = np.zeros((4, 4), np.int32)
  np.add.at(confusion, (labels, predictions), 1)
  groups = shot_groups(np.array([200, 50, 10, 5]))
  assert confusion_metrics(confusion, groups) == recall_metrics(predictions, labels, 4, groups)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: recall_metrics(np.array([0, 1]), np.array([0, 2]), 3), 'class 1 has no test examples'),
    (lambda: recall_metrics(np.array([0, 1]), np.array([0, 3]), 3), r'labels must be in \[0, 3\)'),
    (lambda: recall_metrics(np.zeros(3, int), np.zeros(2, int), 2), r'shape \(3,\), labels \(2,\)'),
    (lambda: harmonic_mean([0.5, np.nan]), 'class 1 has no test examples'),
    (lambda: lowest_recall([[0.5, 1], [np.nan, 1]]), 'class 0 has no test examples'),
    (lambda: geometric_mean([50.0, 70.0]), 'from 50.0 to 70.0, expected shares'),
    (lambda: harmonic_mean([]), r'shape \(0,\), expected \[\.\.\., num_classes\]'),
    (lambda: harmonic_mean([0.5], 0.0), 'zero_replacement is 0.0'),
    (lambda: group_recalls([0.5, 1], {'few': [True]}), r"group 'few' has shape \(1,\)"),
  ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@both_precisions
@golden('friends_and_foes', 'imbalanced_metrics')
def test_yardsticks_of_unequal_classes_agree_with_reference(vectors, x64):
  with jax.enable_x64(x64):
    classes, rtol = vectors.param('num_classes'), 1e-9 if x64 else 2e-6
    arguments = vectors['in_predictions'], vectors['in_labels'], classes
    confusion = confusion_matrix(*arguments)
    np.testing.assert_array_equal(confusion, vectors['out_confusion_true_by_pred'])
    assert_close(per_class_recall(confusion), vectors['out_per_class_recall'], 2e-7)
    assert_close(macro_f1(confusion), vectors['out_macro_f1'], rtol)
    found = imbalanced_metrics(*arguments)
    names = {
      'accuracy': 'accuracy', 'macro_recall': 'macro_recall', 'macro_f1': 'macro_f1',
      'harmonic': 'harmonic_mean_recall', 'lowest': 'min_recall',
    }  # fmt: skip
    assert set(found) == set(names)
    for own, reference in names.items():
      assert_close(found[own], vectors[f'out_{reference}'], rtol)


def test_classes_without_test_examples_are_left_out_with_a_warning():
  predictions, labels = np.array([0, 2, 1, 2, 2]), np.array([0, 0, 2, 2, 2])
  with pytest.warns(UserWarning, match='left out: 1, 3'):
    found = imbalanced_metrics(predictions, labels, 4)
  recalls = np.array([1 / 2, 2 / 3])
  assert_close(found['macro_recall'], recalls.mean(), 1e-6)
  assert_close(found['harmonic'], 1 / np.mean(1 / recalls), 1e-6)
  precision = np.array([1, 2 / 3])
  assert_close(found['macro_f1'], np.mean(2 * precision * recalls / (precision + recalls)), 1e-6)
  assert found['accuracy'] == pytest.approx(0.6)
  with pytest.raises(ValueError, match='expected'):
    imbalanced_metrics(np.zeros(0, int), np.zeros(0, int), 2)
  with pytest.raises(ValueError, match='num_classes, num_classes'):
    macro_f1(np.ones((2, 3)))
