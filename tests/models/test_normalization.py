import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from golden_vectors import assert_close, golden
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads
from models.random_variables import random_images, random_variables, run

from jaxlab.models.normalization import BatchNorm, LayerNorm, layer_normalize


def variables_of(scale, bias, dtype):
  stats = {'mean': np.zeros_like(scale), 'var': np.ones_like(scale)}
  tree = {'params': {'scale': scale, 'bias': bias}, 'batch_stats': stats}
  return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def images(shape):
  return 2 * random_images(shape) + 0.7


@golden('ssl_baselines', 'batch_norm_torch')
@pytest.mark.parametrize('dtype, rtol', [('float64', 1e-9), ('float32', 1e-5)])
def test_sequence_of_batches_then_eval_agrees_with_torch(vectors, dtype, rtol):
  with jax.enable_x64(dtype == 'float64'):
    norm = BatchNorm(momentum=1 - vectors.param('momentum'), epsilon=vectors.param('eps'))
    variables = variables_of(vectors['param_weight'], vectors['param_bias'], dtype)
    for x, y in zip(vectors['in_x_sequence'], vectors['out_y_sequence'], strict=True):
      x = jnp.asarray(x, dtype)
      out, state = run(norm, variables, x, True)
      assert out.dtype == dtype
      assert_close(out, y, rtol)
      variables = {**variables, **state}
    assert_close(variables['batch_stats']['mean'], vectors['out_running_mean'], rtol)
    assert_close(variables['batch_stats']['var'], vectors['out_running_var'], rtol)
    out = run(norm, variables, jnp.asarray(vectors['in_x_eval'], dtype))
    assert_close(out, vectors['out_y_eval'], rtol)


def test_images_are_normalized_per_channel_over_batch_and_positions():
  norm = BatchNorm()
  x = images((4, 5, 6, 3))
  variables = variables_of(np.ones(3), np.zeros(3), 'float32')
  y, state = run(norm, variables, x, True)
  flat = np.asarray(x, np.float64).reshape(-1, 3)
  expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
  assert_close(y.reshape(-1, 3), expected, 1e-5)
  stats = state['batch_stats']
  assert_close(stats['mean'], 0.1 * flat.mean(0), 1e-5)
  assert_close(stats['var'], 0.9 + 0.1 * flat.var(0, ddof=1), 1e-5)


def test_groups_equal_separate_batches_and_average_their_statistics():
  x = images((6, 4, 3))
  grouped, single = BatchNorm(groups=3), BatchNorm()
  variables = random_variables(grouped, x)
  y, state = run(grouped, variables, x, True)
  parts = [run(single, variables, part, True) for part in jnp.split(x, 3)]
  assert_close(y, jnp.concatenate([part[0] for part in parts]), 1e-6)
  for name in ('mean', 'var'):
    expected = np.mean([part[1]['batch_stats'][name] for part in parts], axis=0)
    assert_close(state['batch_stats'][name], expected, 1e-6)
  assert float(jnp.abs(y - run(single, variables, x, True)[0]).max()) > 0.1


@pytest.mark.parametrize('devices, groups', [(1, 1), (8, 1), (8, 8), (1, 4)])
@pytest.mark.parametrize('ratio', [300, 1e4])
def test_mean_far_above_the_deviation_leaves_the_variance_and_the_gradient(ratio, devices, groups):
  x = (np.random.default_rng(0).normal(size=(32, 5, 5, 3)) + ratio).astype(np.float32)
  weights = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
  norm = BatchNorm(groups=groups)
  variables = norm.init(jax.random.key(0), x)
  mesh = Mesh(np.array(jax.devices()[:devices]), ('data',))
  sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data')))

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(x):
    y, state = norm.apply(variables, x, True, mutable=['batch_stats'])
    return jnp.sum(weights * y), (y, state['batch_stats'])

  (_, (y, stats)), gradient = loss(sharded)
  exact, wide = (a.astype(np.float64).reshape(groups, -1, 3) for a in (x, weights))
  variance = exact.var(1, keepdims=True)
  h = (exact - exact.mean(1, keepdims=True)) / np.sqrt(variance + 1e-5)
  pull = wide - wide.mean(1, keepdims=True) - h * (wide * h).mean(1, keepdims=True)
  rounding = 2e-7 * ratio  # of the data themselves: half a unit in the last place, in deviations
  assert_close(y, h.reshape(x.shape), 1e-5, atol=rounding)
  assert_close(gradient, (pull / np.sqrt(variance + 1e-5)).reshape(x.shape), 1e-5, atol=rounding)
  assert_close(stats['mean'], 0.1 * exact.mean((0, 1)), 1e-6)
  assert_close(stats['var'], 0.9 + 0.1 * exact.var(1, ddof=1).mean(0), 1e-5)


def test_outlying_first_example_costs_few_digits():
  x = np.random.default_rng(0).normal(size=(256, 2)).astype(np.float32)
  x[0] = 1e5
  y = run(
    BatchNorm(use_scale=False, use_bias=False),
    {'batch_stats': variables_of(np.ones(2), np.zeros(2), 'float32')['batch_stats']},
    x,
    True,
  )[0]
  exact = x.astype(np.float64)
  assert_close(y, (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5), 1e-4, atol=1e-4)


@pytest.mark.parametrize('groups', [1, 8])
def test_sharded_batch_has_the_statistics_of_one_device(groups):
  norm = BatchNorm(groups=groups)
  x = images((16, 4, 3))
  variables = random_variables(norm, x)

  def loss(x):
    y, state = run(norm, variables, x, True)
    return jnp.mean(jnp.sin(y) ** 2), (y, state)

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  mesh = Mesh(np.array(jax.devices()), ('data',))
  sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data')))
  for actual, expected in zip(
    jax.tree.leaves(step(sharded)), jax.tree.leaves(step(x)), strict=True
  ):
    assert_close(actual, expected, 1e-5, atol=1e-6)


def test_bfloat16_keeps_float32_statistics():
  x = images((64, 4))
  norm = BatchNorm(dtype=jnp.bfloat16)
  variables = random_variables(norm, x)
  low, state = run(norm, variables, x.astype(jnp.bfloat16), True)
  high, expected = run(norm, variables, x, True)
  assert low.dtype == jnp.bfloat16
  assert_close(low, high, 0.02)
  assert state['batch_stats']['var'].dtype == jnp.float32
  assert_close(state['batch_stats']['var'], expected['batch_stats']['var'], 5e-3)


def test_constant_channel_has_finite_output_and_gradient():
  norm = BatchNorm()
  x = jnp.full((8, 3), 1000.1)
  variables = random_variables(norm, x)
  y, grad = jax.value_and_grad(lambda x: jnp.sum(run(norm, variables, x, True)[0] ** 2))(x)
  assert np.isfinite(y) and np.isfinite(grad).all()


def test_vmap_equals_loop():
  norm = BatchNorm()
  x = images((3, 8, 4))
  variables = random_variables(norm, x[0])

  def train(x):
    return run(norm, variables, x, True)[0]

  assert_close(jax.vmap(train)(x), jnp.stack([train(one) for one in x]), 1e-6)


def test_parameters_follow_the_options_and_init_leaves_the_statistics():
  x = images((4, 3))
  assert 'params' not in random_variables(BatchNorm(use_scale=False, use_bias=False), x)
  variables = BatchNorm(use_bias=False).init(jax.random.key(0), x, True)
  assert set(variables['params']) == {'scale'}
  np.testing.assert_array_equal(variables['batch_stats']['mean'], 0)
  np.testing.assert_array_equal(variables['batch_stats']['var'], 1)


def test_single_value_per_channel_raises_in_training_only():
  norm = BatchNorm()
  one = jax.ShapeDtypeStruct((1, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: norm.init(jax.random.key(0), x, True), one)
  jax.eval_shape(norm.apply, variables, one)

  def train(norm, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(
      lambda v, x: norm.apply(v, x, True, mutable=['batch_stats']), variables, x
    )

  train(norm, (1, 2, 2, 3))
  with pytest.raises(ValueError, match='one value per channel'):
    train(norm, (1, 3))
  with pytest.raises(ValueError, match='one value per channel'):
    train(BatchNorm(groups=4), (4, 3))


def test_batch_that_does_not_split_into_groups_raises():
  norm = BatchNorm(groups=3)
  with pytest.raises(ValueError, match='does not split into groups=3'):
    norm.init(jax.random.key(0), jnp.ones((4, 3)), True)


@pytest.mark.parametrize('dtype', [None, jnp.bfloat16])
@pytest.mark.parametrize('input_dtype', [jnp.float32, jnp.bfloat16])
def test_layer_norm_is_flax_own_with_two_passes(dtype, input_dtype):
  x = images((3, 5, 8)).astype(input_dtype)
  own = LayerNorm(epsilon=1e-3, dtype=dtype)
  plain = nn.LayerNorm(epsilon=1e-3, use_fast_variance=False, dtype=dtype)
  variables = random_variables(plain, x)
  assert jax.tree.map(jnp.shape, random_variables(own, x)) == jax.tree.map(jnp.shape, variables)
  results = []
  for norm in (own, plain):
    y, pull = jax.vjp(lambda v, a, n=norm: n.apply(v, a), variables, x)
    results.append((y, *jax.tree.leaves(pull(jnp.cos(y)))))
  tolerance = 1e-5 if dtype is None and input_dtype == jnp.float32 else 3e-2
  for a, b in zip(*results, strict=True):
    assert a.dtype == b.dtype
    assert_close(a.astype(jnp.float32), b.astype(jnp.float32), tolerance)


@pytest.mark.exhaustive
def test_layer_normalization_has_derivatives_of_both_modes_and_orders():
  with jax.enable_x64(True):
    x, scale, bias = (jnp.asarray(images(s), jnp.float64) for s in ((4, 6), (6,), (6,)))
    check_grads(layer_normalize, (x, scale, bias), order=2, modes=('fwd', 'rev'))


def test_layer_normalization_survives_an_outlier_channel():
  x = jnp.array([[1e4, 1e4 + 1, 1e4 + 2, 1e4 + 3]], jnp.float32)
  expected = np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(1.25)
  assert_close(layer_normalize(x, jnp.ones(4), jnp.zeros(4), 0.0)[0], expected, 1e-5)
