import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab.evaluation import weighted_knn


def features(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BANK, LABELS, QUERIES = features(0, 30, 5), np.arange(30) % 4, features(1, 10, 5)


@golden('ssl_baselines', 'knn')
@pytest.mark.parametrize('normalized', [True, False])
def test_scores_and_predictions_agree_with_reference(vectors, normalized):
  scores, predictions = weighted_knn(
    vectors['in_bank'],
    vectors['in_bank_labels'],
    vectors['in_queries'],
    num_classes=vectors.param('num_classes'),
    k=vectors.param('k'),
    temperature=vectors.param('temperature'),
    normalized=normalized,
  )
  np.testing.assert_array_equal(predictions, vectors['out_predictions_top1'])
  assert_close(scores, vectors['out_scores'], 1e-5)
  accuracy = 100 * np.mean(predictions == vectors['in_query_labels'])
  assert_close(accuracy, vectors['out_top1_percent'], 1e-9)


def test_scores_are_the_sum_over_the_nearest():
  scores, predictions = weighted_knn(BANK, LABELS, QUERIES, num_classes=4, k=6, temperature=0.2)
  bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (BANK, QUERIES))
  similarity = queries @ bank.T
  expected = np.zeros((10, 4))
  for query, row in enumerate(similarity):
    for neighbor in np.argsort(-row)[:6]:
      expected[query, LABELS[neighbor]] += np.exp(row[neighbor] / 0.2)
  assert_close(scores, expected, 1e-5)
  np.testing.assert_array_equal(predictions, np.argmax(expected, axis=1))


@pytest.mark.parametrize('chunk_size', [3, 5])
def test_chunks_do_not_change_the_result(chunk_size):
  whole = weighted_knn(BANK, LABELS, QUERIES, num_classes=4, k=6)
  parts = weighted_knn(BANK, LABELS, QUERIES, num_classes=4, k=6, chunk_size=chunk_size)
  assert_close(parts.scores, whole.scores, 1e-5)


def test_feature_lengths_do_not_matter_unless_asked():
  factors = np.random.default_rng(2).uniform(0.5, 2, (30, 1)).astype(np.float32)
  plain = weighted_knn(BANK, LABELS, QUERIES, num_classes=4, k=6)
  scaled = weighted_knn(factors * BANK, LABELS, 3 * QUERIES, num_classes=4, k=6)
  assert_close(scaled.scores, plain.scores, 1e-5)


def test_sharded_traced_and_bfloat16_inputs_give_the_same_neighbors():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('data',))
  sharding = jax.NamedSharding(mesh, jax.P('data'))
  arguments = BANK, LABELS, QUERIES
  plain = weighted_knn(*arguments, num_classes=4, k=6)
  many = weighted_knn(*jax.device_put(arguments, sharding), num_classes=4, k=6)
  assert_close(many.scores, plain.scores, 1e-5)
  traced = jax.jit(lambda *a: weighted_knn(*a, num_classes=4, k=6))(*arguments)
  assert_close(traced.scores, plain.scores, 1e-5)
  half = [BANK.astype(jnp.bfloat16), LABELS, QUERIES.astype(jnp.bfloat16)]
  wide = [x.astype(np.float32) for x in half[::2]]
  assert_close(
    weighted_knn(*half, num_classes=4, k=6).scores,
    weighted_knn(wide[0], LABELS, wide[1], num_classes=4, k=6).scores,
    1e-6,
  )


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'k': 31}, 'k must be in .* size of the bank'),
    ({'k': 0}, 'k must be in'),
    ({'num_classes': 3}, r'bank_labels must be in \[0, 3\)'),
    ({'temperature': 0.0}, 'temperature must be positive'),
    ({'temperature': 0.01}, 'overflows float32'),
    ({'chunk_size': 0}, 'chunk_size'),
    ({'queries': QUERIES[:, :4]}, 'one dimension'),
    ({'queries': QUERIES[:0]}, 'not empty'),
    ({'bank_labels': LABELS[:5]}, '30 rows for 5 labels'),
    ({'bank_labels': LABELS / 1.0}, 'must be integers'),
  ],
)
def test_bad_arguments_raise(change, message):
  arguments = {'bank': BANK, 'bank_labels': LABELS, 'queries': QUERIES, 'num_classes': 4, 'k': 6}
  with pytest.raises(ValueError, match=message):
    weighted_knn(**(arguments | change))


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_features_that_are_not_finite_are_an_error_or_no_class(value):
  bank, queries = BANK.copy(), QUERIES.copy()
  bank[3, 1] = queries[4, 0] = value
  knn = functools.partial(weighted_knn, num_classes=4, k=3)
  with pytest.raises(ValueError, match=r'bank \(30, 5\): 1 rows .* not finite, the first is row 3'):
    knn(bank, LABELS, QUERIES)
  with pytest.raises(ValueError, match=r'queries .* row 4'):
    knn(BANK, LABELS, queries)
  with pytest.raises(ValueError, match='row 0'):
    knn(BANK, LABELS, np.full((2, 5), 1e300))
  predictions = jax.jit(knn)(BANK, LABELS, queries).predictions
  np.testing.assert_array_equal(np.asarray(predictions) == -1, np.arange(10) == 4)
  assert set(jax.jit(knn)(bank, LABELS, QUERIES).predictions.tolist()) == {-1}
