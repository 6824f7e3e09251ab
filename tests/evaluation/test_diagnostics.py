import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close

from jaxlab import evaluation


def features(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


feature_std = jax.jit(evaluation.feature_std)
effective_rank = jax.jit(evaluation.effective_rank, static_argnames='centered')
mean_cosine = jax.jit(evaluation.mean_cosine, static_argnames='centered')


def test_feature_std_is_one_on_the_sphere_and_zero_at_collapse():
  spread = features(0, 512, 8)
  assert_close(feature_std(spread), 1, 0.02)
  assert_close(feature_std(100 * spread), feature_std(spread), 1e-5)
  assert_close(feature_std(np.ones_like(spread)), 0, 0, 1e-5)


def test_cosine_is_one_for_scaled_features_and_minus_one_for_opposite_ones():
  x = features(0, 16, 8)
  assert_close(mean_cosine(x, 2 * x), 1, 1e-5)
  assert_close(mean_cosine(x, -x), -1, 1e-5)


def test_centering_removes_what_all_features_share():
  a, b = features(0, 256, 8), features(1, 256, 8)
  assert mean_cosine(a + 10, b + 10) > 0.9
  assert abs(mean_cosine(a + 10, b + 10, centered=True)) < 0.2
  assert_close(mean_cosine(a + 10, 3 * a - 5, centered=True), 1, 1e-4)


@pytest.mark.parametrize('rank', [1, 3])
def test_effective_rank_counts_equal_directions(rank):
  basis = np.linalg.qr(features(0, 32, rank) - features(0, 32, rank).mean(0))[0]
  x = basis @ np.linalg.qr(features(1, 8, rank))[0].T
  assert_close(effective_rank(x), rank, 1e-3)
  assert_close(effective_rank(x + 5), rank, 1e-3)


def test_effective_rank_of_equal_features_is_one():
  assert float(effective_rank(np.ones((8, 4)))) == 1
  assert_close(effective_rank(np.ones((8, 4)), centered=False), 1, 1e-4)


def test_diagnostics_map_over_feature_sets_and_take_bfloat16():
  sets = features(0, 3, 16, 4)
  for diagnostic in (evaluation.feature_std, evaluation.effective_rank):
    one = jax.jit(diagnostic)
    assert_close(jax.vmap(one)(sets), [one(x) for x in sets], 1e-4)
    assert_close(one(sets[0].astype(jnp.bfloat16)), one(sets[0]), 2e-2)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: evaluation.feature_std(np.ones(3)), 'features must be'),
    (lambda: evaluation.effective_rank(np.ones((0, 3))), 'not empty'),
    (lambda: evaluation.mean_cosine(np.ones((2, 3)), np.ones((3, 3))), 'one shape'),
  ],
)
def test_bad_arguments_raise(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_ratios_of_lengths_are_of_each_row_and_zeros_do_not_divide():
  ratios = evaluation.norm_ratios(np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[10.0], [1.0]]))
  np.testing.assert_allclose(ratios, [0.5, 0.0])
  assert np.isfinite(evaluation.norm_ratios(np.ones((1, 2)), np.zeros((1, 2)))).all()
  with pytest.raises(ValueError, match='as many examples'):
    evaluation.norm_ratios(np.ones((2, 2)), np.ones((3, 2)))
