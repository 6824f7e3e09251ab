import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlab.quantizers.compensation.conv import (
  fit_conv_compensation,
  init_conv_stats,
  num_groups,
  solve_conv,
  stride_of,
  update_conv_stats,
)
from jaxlab.quantizers.compensation.linear import (
  LinearCompensation,
  fit_linear_compensation,
  gate,
  init_linear_stats,
  merge_linear_stats,
  solve_linear,
  update_linear_stats,
)
from jaxlab.quantizers.compensation.linear_apply import apply_linear_compensation

BOTH = pytest.mark.parametrize('x64', [True, False])


def rows(n=200, d_in=6, d_out=4, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((n, d_in))
  err = x @ rng.standard_normal((d_in, d_out)) + rng.standard_normal((n, d_out)) + 0.5
  return x.astype(dtype), err.astype(dtype)


def augmented_solution(x, err, ridge):
  """The normal equations with a column of ones, in float64."""
  a = np.concatenate([x, np.ones((len(x), 1))], 1).astype(np.float64)
  return np.linalg.solve(a.T @ a + ridge * np.eye(a.shape[1]), a.T @ err.astype(np.float64))


@golden('qwt', 'linear_regression')
@BOTH
def test_linear_fit_agrees_with_reference(vectors, x64):
  with jax.enable_x64(x64):
    x, err = jnp.asarray(vectors['in_x']), jnp.asarray(vectors['in_error'])
    for fit in (fit_linear_compensation, jax.jit(fit_linear_compensation)):
      solved = fit(x, err)
      assert_close(solved.weight, vectors['out_weight'], 1e-9 if x64 else 1e-4)
      assert_close(solved.bias, vectors['out_bias'], 1e-9 if x64 else 1e-4)
      assert_close(solved.r2, vectors['out_r2'], 1e-9 if x64 else 1e-5)


@golden('gplq', 'qwt_compensation')
@BOTH
def test_ridge_without_bias_and_least_squares_with_one_agree_with_reference(vectors, x64):
  rtol = 1e-9 if x64 else 5e-6
  with jax.enable_x64(x64):
    x, err = (jnp.asarray(vectors[f'in_{name}'], float) for name in ('x', 'residual'))
    ridge = vectors['hp_ridge'].item()
    solved = fit_linear_compensation(x, err, ridge, bias=False)
    assert_close(solved.weight, vectors['out_ridge_weight'], rtol)
    assert not np.any(solved.bias)
    solved = fit_linear_compensation(x, err)
    assert_close(solved.weight, vectors['out_ols_weight'], rtol)
    assert_close(solved.bias, vectors['out_ols_bias'], rtol)
    assert_close(solved.r2, vectors['out_ols_r2'], rtol)


def test_the_bias_may_be_left_out_of_the_penalty():
  with jax.enable_x64(True):
    x, err = rows(dtype=np.float64)
    solved = fit_linear_compensation(x, err + 5, 30.0, penalize_bias=False)
    a, b = x - x.mean(0), err - err.mean(0)
    weight = np.linalg.solve(a.T @ a + 30 * np.eye(6), a.T @ b)
    assert_close(solved.weight, weight, 1e-9)
    assert_close(solved.bias, (err + 5).mean(0) - x.mean(0) @ weight, 1e-9)


@golden('qwt', 'conv_regression')
@BOTH
def test_convolutional_fit_agrees_with_reference(vectors, x64):
  cases = [name.removeprefix('in_x_') for name in vectors if name.startswith('in_x_')]
  with jax.enable_x64(x64):
    for i in cases:
      x, err = (
        jnp.asarray(vectors[f'in_{name}_{i}']).transpose(0, 2, 3, 1) for name in ('x', 'error')
      )
      sizes = [vectors.param(f'{name}_{i}') for name in ('kernel_size', 'groups', 'stride')]
      solved = fit_conv_compensation(x, err, *sizes)
      weight = solved.weight.transpose(3, 2, 0, 1)
      assert_close(weight, vectors[f'out_weight_{i}'], 1e-9 if x64 else 1e-4)
      assert_close(solved.bias, vectors[f'out_bias_{i}'], 1e-9 if x64 else 1e-4)
      assert_close(solved.r2, vectors[f'out_r2_{i}'], 1e-9 if x64 else 1e-5)


@golden('qwt', 'compensation_forward')
def test_compensated_output_agrees_with_reference(vectors):
  x = vectors['in_x']
  fitted = LinearCompensation(vectors['in_weight'], vectors['in_bias'], np.float32(0.5))
  assert_close(apply_linear_compensation(x, x, fitted), vectors['out_eval_half'], 1e-6)
  in_float = apply_linear_compensation(x, x, fitted, jnp.float32)
  assert_close(in_float, vectors['out_train_float'], 1e-6)
  for r2 in (-0.1, 0.0, np.nan):
    off = gate(fitted._replace(r2=np.float32(r2)))
    assert_close(apply_linear_compensation(x, x, off), vectors['out_eval_r2_negative'], 1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1e-3, 10.0]))
def test_ridge_with_penalized_bias_solves_the_augmented_normal_equations(seed, ridge):
  with jax.enable_x64(True):
    x, err = rows(40, seed=seed, dtype=np.float64)
    x = x + 3
    solved = fit_linear_compensation(x, err, ridge)
    expected = augmented_solution(x, err, ridge)
    assert_close(np.vstack([solved.weight, solved.bias]), expected, 1e-9)
    residual = err - x @ solved.weight - solved.bias
    assert_close(solved.r2, 1 - np.sum(residual**2) / np.sum((err - err.mean(0)) ** 2), 1e-9)


def test_streamed_merged_and_weighted_statistics_are_those_of_all_rows_at_once():
  with jax.enable_x64(True):
    x, err = rows(dtype=np.float64)
    once = update_linear_stats(init_linear_stats(6, 4), x, err)
    stream = init_linear_stats(6, 4)
    for i in range(0, 200, 40):
      stream = update_linear_stats(stream, x[i : i + 40], err[i : i + 40])
    parts = [update_linear_stats(init_linear_stats(6, 4), x[i::2], err[i::2]) for i in (0, 1)]
    weights = jnp.asarray(np.arange(400) % 2 == 0)
    padded = [np.repeat(a, 2, 0) * np.where(np.arange(400) % 2, 7, 1)[:, None] for a in (x, err)]
    masked = update_linear_stats(init_linear_stats(6, 4), *padded, weights)
    for other in (stream, merge_linear_stats(*parts), masked):
      jax.tree.map(lambda a, b: assert_close(a, b, 1e-12), other, once)


def test_groups_are_separate_regressions():
  x, err = rows()
  grouped = solve_linear(update_linear_stats(init_linear_stats(6, 4, 2), x, err))
  for g in (0, 1):
    alone = fit_linear_compensation(x[:, 3 * g : 3 * g + 3], err[:, 2 * g : 2 * g + 2])
    assert_close(grouped.weight[g], alone.weight, 1e-5)
    assert_close(grouped.bias[2 * g : 2 * g + 2], alone.bias, 1e-5)


def test_streamed_convolution_is_that_of_all_images_at_once():
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    x, err = rng.standard_normal((8, 4, 4, 6)), rng.standard_normal((8, 2, 2, 4))
    stats = init_conv_stats(6, err.shape, 3, 2)
    for i in (0, 2, 4, 6):
      stats = update_conv_stats(stats, x[i : i + 2], err[i : i + 2], 3)
    whole = fit_conv_compensation(x, err, 3, 2)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-10), solve_conv(stats, 3), whole)


@pytest.mark.parametrize('offset', [0.0, 1e3])
def test_float32_statistics_survive_a_mean_far_above_the_deviation(offset):
  x, err = rows(4000, 32, 8)
  x = (x + np.float32(offset)).astype(np.float32)
  stats = init_linear_stats(32, 8)
  for i in range(0, 4000, 100):
    stats = update_linear_stats(stats, x[i : i + 100], err[i : i + 100])
  assert stats.scatter_x.dtype == jnp.float32
  solved = solve_linear(stats)
  exact = np.linalg.lstsq(
    x.astype(np.float64) - x.mean(0, np.float64), err - err.mean(0, np.float64), rcond=None
  )[0]
  assert_close(solved.weight[0], exact, 2e-6 if offset == 0 else 1e-4)


def test_outlier_channels_do_not_hide_the_others():
  x, err = rows(2000, 8, 4)
  x[:, 0] *= 3e4
  solved = fit_linear_compensation(x, err)
  expected = augmented_solution(x, err, 0.0)
  assert_close(solved.weight[1:], expected[1:-1], 1e-5)
  assert_close(solved.weight[0], expected[0], 1e-4)


def test_fewer_rows_than_columns_give_the_interpolating_solution_and_a_warning():
  x, err = rows(5, 12, 3)
  with pytest.warns(RuntimeWarning, match='5 calibration rows for 12 features'):
    solved = fit_linear_compensation(x, err)
  assert_close(x @ solved.weight + solved.bias, err, 1e-4)
  assert float(np.max(np.abs(solved.weight))) < 10
  assert_close(solved.r2, 1.0, 1e-5)
  jitted = jax.jit(fit_linear_compensation)(x, err)
  assert_close(x @ jitted.weight + jitted.bias, err, 1e-3)


def test_collinear_and_constant_features_do_no_harm():
  x, err = rows()
  wide = np.concatenate([x, x[:, :2], np.full((200, 1), 0.1, np.float32)], 1)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    solved = fit_linear_compensation(wide, err)
  alone = fit_linear_compensation(x, err)
  assert_close(wide @ solved.weight + solved.bias, x @ alone.weight + alone.bias, 1e-4)
  assert_close(solved.weight[-1], np.zeros(4), atol=1e-6)


def test_error_without_variance_has_no_r2_and_is_skipped():
  x, _ = rows()
  solved = gate(fit_linear_compensation(x, np.ones((200, 4), np.float32)))
  assert float(solved.r2) == 0 and not np.any(solved.bias)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_sixteen_bit_products_are_close_and_keep_the_output_dtype(dtype):
  x, y = rows()
  fitted = fit_linear_compensation(x, y)
  wide = apply_linear_compensation(y, x, fitted, jnp.float32)
  narrow = apply_linear_compensation(y, x, fitted, dtype)
  assert_close(narrow, wide, 4 * float(jnp.finfo(dtype).eps))
  assert np.any(narrow != wide)
  assert apply_linear_compensation(jnp.bfloat16(y), x, fitted, dtype).dtype == jnp.bfloat16


@pytest.mark.parametrize('size, weight', [(1e6, 1e-3), (6e4, 2.0)])
def test_half_overflow_falls_back_to_float32(size, weight):
  x = np.full((2, 3), size, np.float32)
  fitted = LinearCompensation(np.full((3, 3), weight, np.float32), np.zeros(3, np.float32), 1.0)
  apply = jax.jit(apply_linear_compensation, static_argnums=3)
  y = apply(x, x, fitted, jnp.float16)
  assert_close(y, apply(x, x, fitted, jnp.float32), 1e-7)


def test_convolution_in_half_is_close_to_float():
  rng = np.random.default_rng(0)
  x, err = (rng.standard_normal(s).astype(np.float32) for s in ((8, 4, 4, 4), (8, 2, 2, 6)))
  fitted = fit_conv_compensation(x, err, 3, 2)
  half = apply_linear_compensation(err, x, fitted)
  assert_close(half, apply_linear_compensation(err, x, fitted, jnp.float32), 2e-3)


def test_statistics_of_a_sharded_batch_are_those_of_one_device():
  x, err = rows(64)
  mesh = Mesh(np.asarray(jax.devices()), ('data',))
  sharded = jax.device_put((x, err), NamedSharding(mesh, PartitionSpec('data')))
  update = jax.jit(update_linear_stats)
  eight, one = (update(init_linear_stats(6, 4), *batch) for batch in (sharded, (x, err)))
  jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), eight, one)


def test_gradients_reach_the_compensation_in_half_and_float():
  x, y = rows()
  fitted = fit_linear_compensation(x, y)
  for dtype in (jnp.float16, jnp.float32):
    grads = jax.grad(lambda c, d=dtype: jnp.sum(apply_linear_compensation(y, x, c, d) ** 2))(fitted)
    assert np.all(np.isfinite(grads.weight)) and np.any(grads.weight != 0)
    assert np.any(grads.bias != 0)


def test_bad_arguments_raise():
  x, err = rows()
  with pytest.raises(ValueError, match='one input token per output token'):
    fit_linear_compensation(x[:-1], err)
  with pytest.raises(ValueError, match='6 inputs and 4 outputs got'):
    update_linear_stats(init_linear_stats(6, 4), x[:, 1:], err)
  for bad in (np.nan, np.inf):
    broken = err.copy()
    broken[3, 1] = bad
    with pytest.raises(ValueError, match='not finite'):
      fit_linear_compensation(x, broken)
  with pytest.raises(ValueError, match='no rows'):
    solve_linear(init_linear_stats(2, 2))
  with pytest.raises(ValueError, match='groups=4 must divide'):
    init_linear_stats(6, 4, 4)
  with pytest.raises(ValueError, match='do not divide 128 input and 3'):
    num_groups(128, 3, 64)
  images = np.zeros((2, 6, 6, 4), np.float32)
  with pytest.raises(ValueError, match='kernel_size=2'):
    fit_conv_compensation(images, images, 2)
  with pytest.raises(ValueError, match=r'stride=2, but .* say 1'):
    fit_conv_compensation(images, images, stride=2)


def test_strides_are_one_or_two_and_odd_sizes_are_refused():
  assert stride_of((1, 6, 8, 2), (1, 6, 8, 3)) == 1
  assert stride_of((1, 6, 8, 2), (1, 3, 4, 3)) == 2
  for out in ((1, 2, 2, 3), (1, 3, 3, 3), (1, 4, 4, 3)):
    with pytest.raises(ValueError, match='stride 1 or 2'):
      stride_of((1, 7, 7, 2), out)
