import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.quantizers.compensation import bipolar_scales
from jaxlab.quantizers.compensation.bipolar import (
  apply_nbc,
  blt,
  debias,
  fit_nbc,
  gate_bipolar,
  init_bipolar_stats,
  init_prediction_stats,
  inverse_blt,
  solve_bipolar,
  update_bipolar_stats,
  update_prediction_stats,
)
from jaxlab.quantizers.compensation.bipolar_scales import select_nbc_scales
from jaxlab.quantizers.compensation.linear import fit_linear_compensation

INF = float('inf')
SCALES = st.sampled_from([1e-3, 0.25, 1.0, 7.0, 1e3, INF])
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
TINY = float(jnp.finfo(jnp.float32).tiny)
round_trip = jax.jit(lambda x, scale: inverse_blt(blt(x, scale), scale))


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, min_size=8, max_size=8), SCALES)
def test_inverse_of_the_transform_is_the_identity_on_all_floats(values, scale):
  x = np.asarray([*values, 0, 1e-45, 1e-40, 1e4, -1e4, 3.4028235e38], np.float32)
  y = np.asarray(round_trip(x, np.float32(scale)), np.float64)
  # A logarithm of up to 95 with 24 bits; denormals may be flushed, in units of the scale.
  bound = 8e-6 * np.abs(x.astype(np.float64)) + 4 * TINY * max(scale if scale < INF else 1, 1)
  assert np.all(np.abs(y - x) <= bound), (x, y)


@settings(max_examples=25, deadline=None)
@given(st.lists(FLOATS, min_size=16, max_size=16), SCALES)
def test_transform_is_odd_and_monotonic(values, scale):
  x = np.sort(np.asarray(values, np.float32))
  z = np.asarray(blt(x, scale))
  np.testing.assert_array_equal(blt(-x, scale), -z)
  np.testing.assert_array_equal(inverse_blt(-z, scale), -np.asarray(inverse_blt(z, scale)))
  assert np.all(np.diff(z) >= -1e-6 * np.abs(z[1:]))
  assert float(blt(jnp.zeros(()), scale)) == 0


def test_ordinary_values_are_strictly_ordered():
  x = np.linspace(-50, 50, 1001, dtype=np.float32)
  assert np.all(np.diff(blt(x, 0.5)) > 0) and np.all(np.diff(inverse_blt(x, 0.5)) > 0)


@pytest.mark.exhaustive
def test_gradients_are_those_of_the_formula_everywhere():
  x = jnp.asarray([-1e30, -1e4, -1.0, -1e-30, 0.0, 1e-30, 1.0, 1e4, 1e30])
  slope = jax.vmap(jax.grad(blt), (0, None))
  for scale in (0.5, 3.0):
    assert_close(slope(x, scale) * (scale + np.abs(x)), np.ones(9), 1e-5)
  np.testing.assert_array_equal(slope(x, INF), 1)
  z = jnp.asarray([-60.0, -25.0, -1.0, 0.0, 1.0, 19.0, 21.0, 60.0])
  grads = jax.vmap(jax.grad(inverse_blt), (0, None))(z, 2.0)
  assert_close(grads / (2 * np.exp(np.abs(z))), np.ones(8), 2e-5)


def test_sixteen_bit_values_are_transformed_in_float32():
  x = jnp.asarray([-3.0, 0.1, 600.0], jnp.bfloat16)
  assert blt(x).dtype == jnp.float32
  assert_close(inverse_blt(blt(x)), x.astype(jnp.float32), 1e-6)


def heavy(seed, n=2000, d=32, noise=0.05):
  rng = np.random.default_rng(seed)
  matrix = np.random.default_rng(99).standard_normal((d, d)) / d**0.5
  x = rng.standard_t(2, (n, d))
  z = np.sign(x) * np.log1p(np.abs(x)) @ matrix + noise * rng.standard_normal((n, d))
  return x.astype(np.float32), (np.sign(z) * np.expm1(np.abs(z))).astype(np.float32)


def r2(err, predicted):
  return 1 - np.sum((err - predicted) ** 2) / np.sum((err - err.mean(0)) ** 2)


@pytest.mark.parametrize('seed', [1, 2])
@pytest.mark.parametrize('debiased', [True, False])
def test_heavy_tails_are_fitted_where_a_line_fails(seed, debiased):
  x, err = heavy(seed)
  new_x, new_err = heavy(seed + 10)
  params = fit_nbc(x, err, debiased=debiased)
  own = r2(new_err, np.asarray(apply_nbc(np.zeros_like(new_err), new_x, params, jnp.float32)))
  line = fit_linear_compensation(x, err)
  assert own > 0.9 and own > r2(new_err, new_x @ line.weight + line.bias) + 0.4
  assert_close(params.r2, r2(err, np.asarray(apply_nbc(0 * err, x, params, jnp.float32))), 1e-4)


def test_corrupted_rows_harm_a_line_more():
  rng = np.random.default_rng(0)
  d, n = 16, 4000
  matrix = 0.1 * rng.standard_normal((d, d)) / d**0.5
  x = rng.standard_normal((n, d)).astype(np.float32)
  err = x @ matrix + 0.1 * np.tanh(2 * x) @ matrix + 0.05 * rng.standard_normal((n, d))
  err = err.astype(np.float32)
  broken = x.copy()
  broken[:4] *= 50
  medians = {}
  for name, data in (('clean', x), ('broken', broken)):
    line, curve = fit_linear_compensation(data, err), fit_nbc(data, err)
    nbc = np.asarray(apply_nbc(0 * err[4:], x[4:], curve, jnp.float32)) - err[4:]
    medians['nbc', name] = np.median(np.abs(nbc))
    medians['qwt', name] = np.median(np.abs(x[4:] @ line.weight + line.bias - err[4:]))
  loss = {m: medians[m, 'broken'] / medians[m, 'clean'] for m in ('nbc', 'qwt')}
  assert loss['qwt'] > 1.01 and loss['nbc'] - 1 < 0.5 * (loss['qwt'] - 1), medians


def linear_data(seed=0, n=300):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((n, 8))
  return x, 0.3 * x @ rng.standard_normal((8, 5)) + rng.standard_normal((n, 5)) + 0.1


def test_large_scales_give_the_linear_compensation():
  with jax.enable_x64(True):
    x, err = linear_data()
    line = fit_linear_compensation(x, err)
    scales = 1e6 * np.abs(x).max(), 1e6 * np.abs(err).max()
    for pair, rtol in ((scales, 1e-6), ((INF, INF), 1e-12)):
      params = fit_nbc(x, err, *pair, ridge=0.0)
      assert_close(apply_nbc(0 * err, x, params, jnp.float64), x @ line.weight + line.bias, rtol)
      assert_close(params.r2, line.r2, 1e-6)
    assert np.all(np.isinf(params.z_max)) and np.all(params.kappa == 1)


def test_predictions_beyond_the_calibration_range_are_bounded():
  x, err = heavy(0)
  params = fit_nbc(x, err, debiased=False)
  far = np.asarray(apply_nbc(0 * err[:10], 1e20 * x[:10], params, jnp.float32))
  assert np.all(np.abs(far) <= np.abs(err).max(0) * (1 + 1e-4))


def test_streamed_fit_is_that_of_all_rows_at_once():
  with jax.enable_x64(True):
    x, err = (a.astype(np.float64) for a in heavy(3, 400, 8))
    stats, predicted = init_bipolar_stats(8, 8), init_prediction_stats(8)
    batches = [slice(i, i + 100) for i in range(0, 400, 100)]
    for batch in batches:
      stats = update_bipolar_stats(stats, x[batch], err[batch], 0.5, 2.0)
    params = solve_bipolar(stats, 0.5, 2.0)
    for batch in batches:
      predicted = update_prediction_stats(predicted, x[batch], err[batch], params)
    whole = fit_nbc(x, err, 0.5, 2.0)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-9), debias(params, predicted), whole)


def test_zero_padding_commutes_with_the_transform():
  x = np.random.default_rng(0).standard_normal((2, 3, 3, 2)).astype(np.float32)
  pad = ((0, 0), (1, 1), (1, 1), (0, 0))
  np.testing.assert_array_equal(blt(np.pad(x, pad)), np.pad(blt(x), pad))


def test_search_takes_the_identity_on_linear_data_and_a_logarithm_on_heavy_tails():
  x, _ = linear_data()
  exact = (x @ np.linspace(-1, 1, 40).reshape(8, 5)).astype(np.float32)
  assert select_nbc_scales(x.astype(np.float32), exact) == (INF, INF)
  assert all(scale < INF for scale in select_nbc_scales(*heavy(4, 800, 8)))


def loop_over_pairs(x, err, factors, ridge=1e-6):
  """The pair of scales with the best R^2 on every fourth example, each pair fitted by itself."""
  held = np.arange(len(x)) % 4 == 3
  scores = {}
  for scale_x in sorted(f * np.abs(x).mean() for f in factors):
    for scale_err in sorted(f * np.abs(err).mean() for f in factors):
      params = fit_nbc(x[~held], err[~held], scale_x, scale_err, ridge)
      left = err[held] - apply_nbc(np.zeros_like(err[held]), x[held], params, jnp.float32)
      scores[scale_x, scale_err] = 1 - np.sum(left**2)  # the denominator is the same for all
  return max(scores, key=scores.get)


@pytest.mark.parametrize('seed', range(3))
def test_search_in_two_passes_chooses_what_a_loop_over_pairs_does(seed):
  x, err = heavy(seed, 200, 5)
  factors = (0.25, 1.0, 4.0, 16.0, INF)
  expected = loop_over_pairs(x, err, factors)
  np.testing.assert_allclose(select_nbc_scales(x, err, factors), expected, rtol=1e-5)


def test_statistics_of_all_pairs_are_those_of_each():
  x, err = heavy(1, 60, 4)
  weights = np.float32(np.arange(60) % 4 != 3)
  scales_x, scales_err = np.float32([0.5, INF]), np.float32([0.1, 1.0, INF])
  empty = init_bipolar_stats(4, 4)
  stats = bipolar_scales._stack(empty, 2, 3)
  update = jax.jit(bipolar_scales.update_candidate_stats)
  for rows in (slice(0, 30), slice(30, 60)):
    stats = update(stats, x[rows], err[rows], scales_x, scales_err, weights=weights[rows])
  assert stats.linear.scatter_x.shape == (2, 1, 4, 4)  # not for each scale of the error
  for i, j in np.ndindex(2, 3):
    alone = update_bipolar_stats(empty, x, err, scales_x[i], scales_err[j], weights=weights)
    own = bipolar_scales._pick(stats, i, j)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), own, alone)


def test_search_without_enough_examples_warns():
  x, err = heavy(5, 3, 2)
  with pytest.warns(RuntimeWarning, match='too few to hold a quarter out'):
    select_nbc_scales(x[:, None].repeat(20, 1), err[:, None].repeat(20, 1), (1.0, INF))


def test_error_of_zero_gives_no_compensation():
  x = linear_data()[0].astype(np.float32)
  params = gate_bipolar(fit_nbc(x, np.zeros((300, 5), np.float32)))
  assert float(params.r2) == 0
  y = np.ones((300, 5), np.float32)
  np.testing.assert_array_equal(apply_nbc(y, x, params), y)


def test_bad_arguments_raise():
  x, err = heavy(0, 50, 4)
  for bad in (0.0, -1.0, np.nan):
    with pytest.raises(ValueError, match='must be positive'):
      blt(x, bad)
    with pytest.raises(ValueError, match='must be positive'):
      fit_nbc(x, err, 1.0, bad)
  with pytest.raises(ValueError, match='not finite'):
    fit_nbc(x, err * np.nan)
  with pytest.raises(ValueError, match='one input token per output token'):
    fit_nbc(x[1:], err)
  with pytest.warns(RuntimeWarning, match='3 calibration rows for 4 features'):
    fit_nbc(x[:3], err[:3])
