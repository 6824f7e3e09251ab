import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import evaluation

update = jax.jit(evaluation.tally_update)
top_k_accuracy = jax.jit(evaluation.top_k_accuracy, static_argnums=2)


def batch(seed, size=16, num_classes=7):
  rng = np.random.default_rng(seed)
  # Few distinct values, so that there are ties.
  logits = rng.integers(0, 5, size=(size, num_classes)).astype(np.float32)
  return logits, rng.integers(0, num_classes, size=size)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_top_k_counts_what_lax_top_k_finds_also_in_ties(seed):
  logits, labels = batch(seed)
  order = np.argsort(-logits, axis=-1, kind='stable')
  for k in (1, 3):
    found = np.any(order[:, :k] == labels[:, None], axis=-1)
    assert_close(top_k_accuracy(logits, labels, k), np.mean(found), 1e-6)


def test_equal_logits_are_right_only_for_the_first_class():
  assert float(top_k_accuracy(np.zeros((4, 4)), np.arange(4), 1)) == 0.25


def test_nan_logits_are_an_error_or_make_every_metric_nan():
  logits, labels = np.zeros((3, 4), np.float32), np.array([0, 1, 1])
  logits[1, 2] = np.nan
  start = evaluation.tally_init(4)
  for call in (
    lambda: evaluation.top_k_accuracy(logits, labels),
    lambda: evaluation.tally_update(start, logits, labels),
    lambda: evaluation.predicted_classes(logits),
  ):
    with pytest.raises(
      ValueError, match=r'logits \(3, 4\): 1 rows hold .* NaN, the first is row 1'
    ):
      call()
  assert np.isnan(top_k_accuracy(logits, labels, 1))
  assert jax.jit(evaluation.predicted_classes)(logits).tolist() == [0, -1, 0]
  metrics = evaluation.tally_compute(update(start, logits, labels), top_k=(1, 3))
  assert all(np.isnan(value).all() for value in metrics.values())
  counted = np.array([True, False, True])
  assert top_k_accuracy(logits, labels, 1, counted) == 0.5
  state = evaluation.tally_update(start, logits, labels, counted)
  assert evaluation.tally_compute(state, top_k=(1,))['top_1_accuracy'] == 0.5


def test_masked_classes_are_the_last_ranks():
  logits = np.array([[-np.inf, 1.0, 0.0]], np.float32)
  assert evaluation.label_rank(logits, np.array([0])) == 2
  assert evaluation.predicted_classes(logits) == 1


def test_classes_of_float64_logits_are_told_apart_where_float32_cannot():
  logits = np.array([[1.0, 1.0 + 1e-12, 0.0]])
  assert evaluation.predicted_classes(logits).tolist() == [1]
  assert evaluation.predicted_classes(logits.astype(np.float32)).tolist() == [0]


def test_confusion_matrix_has_labels_as_rows():
  confusion = evaluation.confusion_matrix(np.array([1, 1, 2]), np.array([0, 0, 2]), 3)
  assert confusion.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]
  recall = evaluation.per_class_recall(confusion)
  assert_close(recall, [0, np.nan, 1], where=[True, False, True])
  assert np.isnan(recall[1])


def test_tally_over_batches_agrees_with_all_at_once():
  logits, labels = batch(0, size=48)
  state = evaluation.tally_init(7)
  for part in range(0, 48, 16):
    state = update(state, logits[part : part + 16], labels[part : part + 16])
  metrics = evaluation.tally_compute(state, top_k=(1, 5, 7))
  assert set(metrics) == {
    'top_1_accuracy', 'top_5_accuracy', 'per_class_recall', 'mean_per_class_recall'
  }  # fmt: skip
  for k in (1, 5):
    assert_close(metrics[f'top_{k}_accuracy'], top_k_accuracy(logits, labels, k), 1e-6)
  correct = np.argmax(logits, axis=-1) == labels
  recall = [np.mean(correct[labels == c]) for c in range(7)]
  assert_close(metrics['per_class_recall'], recall, 1e-6)
  assert_close(metrics['mean_per_class_recall'], np.mean(recall), 1e-6)


def test_padding_does_not_count_whatever_its_labels():
  logits, labels = batch(1)
  padded = np.concatenate([logits, logits[:4]]), np.concatenate([labels, [-1, 99, 0, 1]])
  mask = np.arange(20) < 16
  start = evaluation.tally_init(7)
  jax.tree.map(
    np.testing.assert_array_equal, update(start, *padded, mask), update(start, logits, labels)
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    evaluation.tally_update(start, *padded, mask),
    update(start, logits, labels),
  )
  accuracy = evaluation.top_k_accuracy(*padded, 1, mask)
  assert_close(accuracy, top_k_accuracy(logits, labels, 1), 1e-6)


def test_labels_out_of_range_make_metrics_nan_under_jit():
  logits, labels = batch(2)
  wrong = labels.copy()
  wrong[:2] = [-1, 7]
  state = update(evaluation.tally_init(7), logits, wrong)
  assert int(state.count) == 16
  assert int(jnp.sum(state.confusion)) == 14
  assert int(jnp.sum(state.ranks)) == 14
  assert np.isnan(evaluation.tally_compute(state)['top_1_accuracy'])
  assert np.isnan(top_k_accuracy(logits, wrong, 1))


def test_tally_of_sharded_batches_is_equal():
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  logits, labels = batch(3)
  mask = np.arange(16) != 5
  sharded = jax.device_put((logits, labels, mask), jax.NamedSharding(mesh, jax.P('data')))
  start = evaluation.tally_init(7)
  one, many = update(start, logits, labels, mask), update(start, *sharded)
  jax.tree.map(np.testing.assert_array_equal, one, many)


LOGITS = np.zeros((4, 3), np.float32)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: evaluation.top_k_accuracy(LOGITS, np.array([0, 1, 2, 3])),
      r'labels must be in \[0, 3\)',
    ),
    (lambda: evaluation.top_k_accuracy(LOGITS, np.zeros(4)), 'must be integers'),
    (lambda: evaluation.top_k_accuracy(LOGITS, np.zeros(4, int), 4), r'k must be in \[1, 3\]'),
    (lambda: evaluation.top_k_accuracy(LOGITS, np.zeros(3, int)), 'labels'),
    (
      lambda: evaluation.confusion_matrix(np.array([3]), np.array([0]), 3),
      'predictions must be in',
    ),
    (lambda: evaluation.tally_init(0), 'num_classes must be positive'),
    (
      lambda: evaluation.tally_update(evaluation.tally_init(4), LOGITS, np.zeros(4, int)),
      r'logits \[batch, 4\]',
    ),
    (
      lambda: evaluation.tally_update(evaluation.tally_init(3), LOGITS, np.array([0, 1, 2, -1])),
      'labels must be in',
    ),
    (lambda: evaluation.tally_compute(evaluation.tally_init(3), top_k=(0,)), 'k must be in'),
  ],
)
def test_bad_arguments_raise(call, message):
  with pytest.raises(ValueError, match=message):
    call()
