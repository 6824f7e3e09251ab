import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab.quantizers.numerics import gptq as g
from jaxlab.quantizers.numerics import hessians

KEY = jax.random.key(0)


def hessian_of(batches):
  state = hessians.init_hessian(batches.shape[-1])
  for x in batches:
    state = hessians.accumulate_hessian(state, x)
  return state


@golden('quantisers', 'gptq')
def test_gptq_agrees_with_reference(vectors):
  weight, batches = jnp.asarray(vectors['in_weight']), jnp.asarray(vectors['in_batches'])
  state = hessian_of(batches)
  assert_close(state.hessian, vectors['out_hessian'])
  i = 0
  while f'param_bits_{i}' in vectors:
    bits = vectors.param(f'bits_{i}')
    rule = {'symmetric': vectors.param(f'sym_{i}'), 'mse': vectors.param(f'mse_{i}')}
    rule['one_sided'] = True  # the authors' code
    scale, zero = g.row_params(weight, bits, **rule)
    assert_close(scale, vectors[f'out_rtn_scale_{i}'])
    assert_close(zero, vectors[f'out_rtn_zero_{i}'])
    codes = jnp.clip(jnp.round(weight / scale[:, None]) + zero[:, None], 0, 2**bits - 1)
    nearest = (codes - zero[:, None]) * scale[:, None]
    group_size = vectors.param(f'groupsize_{i}')
    result = g.gptq(
      weight,
      state.hessian,
      bits,
      **rule,
      group_size=None if group_size == -1 else group_size,
      block_size=vectors.param(f'blocksize_{i}'),
      damping=vectors.param(f'percdamp_{i}'),
      act_order=vectors.param(f'actorder_{i}'),
      static_groups=vectors.param(f'static_{i}'),
    )
    np.testing.assert_array_equal(g.dequantize_groups(*result[1:]), result.weight)
    if group_size == -1:
      assert_close(result.scale[:, 0], vectors[f'out_rtn_scale_{i}'])
    expected_error = float(hessians.output_error(weight, vectors[f'out_weight_{i}'], state))
    error = float(hessians.output_error(weight, result.weight, state))
    rtn_error = float(hessians.output_error(weight, vectors[f'out_rtn_{i}'], state))
    assert error < rtn_error
    # A weight on a rounding tie may take the other code; then the output error decides.
    steps = np.abs(np.asarray(nearest) - vectors[f'out_rtn_{i}']) / np.asarray(scale)[:, None]
    assert np.mean(steps > 0.5) <= 0.02 and np.max(steps) < 1.01
    if not np.allclose(result.weight, vectors[f'out_weight_{i}'], rtol=1e-4, atol=1e-5):
      assert abs(error - expected_error) < 0.02 * expected_error
    i += 1
  assert i > 0


def textbook(weight, hessian, bits, damping=0.01):
  """GPTQ of one group in NumPy: the inverse of what is left, column by column (no Cholesky, no blocks)."""
  weight, hessian = np.array(weight, np.float64), np.array(hessian, np.float64)
  hessian += damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
  low, high = np.minimum(weight.min(1), 0), np.maximum(weight.max(1), 0)
  scale = (high - low) / (2**bits - 1)
  zero = np.round(-low / scale)
  out = np.zeros_like(weight)
  for i in range(weight.shape[1]):
    inverse = np.linalg.inv(hessian[i:, i:])
    code = np.clip(np.round(weight[:, i] / scale) + zero, 0, 2**bits - 1)
    out[:, i] = (code - zero) * scale
    error = (weight[:, i] - out[:, i]) / inverse[0, 0]
    weight[:, i:] -= np.outer(error, inverse[0])
  return out


INPUTS = jax.random.normal(KEY, (4, 24, 12)) @ jax.random.normal(jax.random.key(1), (12, 12))
WEIGHT = jax.random.normal(jax.random.key(2), (5, 12))
STATE = hessian_of(INPUTS.reshape(2, 2, 24, 12))


@pytest.mark.parametrize('block_size', [1, 5, 128])
def test_blocks_change_nothing_but_speed(block_size):
  with jax.enable_x64(True):
    weight, hessian = (jnp.asarray(np.asarray(a), jnp.float64) for a in (WEIGHT, STATE.hessian))
    result = g.gptq(weight, hessian, 3, block_size=block_size)
    np.testing.assert_allclose(result.weight, textbook(WEIGHT, STATE.hessian, 3), atol=1e-9)


def test_the_hessian_does_not_depend_on_the_batches():
  whole = hessian_of(INPUTS[None])
  parts = hessian_of(INPUTS[:, None])
  np.testing.assert_allclose(parts.hessian, whole.hessian, rtol=1e-5, atol=1e-4)
  flat = np.asarray(INPUTS, np.float64).reshape(-1, 12)
  np.testing.assert_allclose(whole.hessian, 2 / 4 * flat.T @ flat, rtol=1e-4, atol=1e-4)
  assert whole.sequences == parts.sequences == 4
  one = hessians.accumulate_hessian(hessians.init_hessian(12), INPUTS[0])
  assert one.sequences == 1
  coarse = hessians.accumulate_hessian(hessians.init_hessian(12), INPUTS.astype(jnp.bfloat16))
  assert coarse.hessian.dtype == jnp.float32
  np.testing.assert_allclose(
    coarse.hessian, whole.hessian, atol=0.01 * float(jnp.max(whole.hessian))
  )


def test_a_sharded_batch_gives_the_same_hessian():
  mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.device_put(INPUTS, jax.NamedSharding(mesh, jax.P('data')))
  state = jax.jit(hessians.accumulate_hessian)(hessians.init_hessian(12), spread)
  np.testing.assert_allclose(state.hessian, hessian_of(INPUTS[None]).hessian, rtol=1e-5, atol=1e-4)


def test_output_error_is_that_of_the_outputs():
  other = WEIGHT + 0.1
  difference = np.asarray(INPUTS @ (other - WEIGHT).T, np.float64)
  np.testing.assert_allclose(
    hessians.output_error(WEIGHT, other, STATE), np.sum(difference**2), rtol=1e-4
  )


@pytest.mark.parametrize('options', [{}, {'act_order': True}, {'group_size': 5}])
def test_errors_are_below_rounding_and_dead_inputs_are_zero(options):
  inputs = INPUTS.at[..., 7].set(0)
  state = hessian_of(inputs[None])
  result = g.gptq(WEIGHT, state.hessian, 3, block_size=4, **options)
  scale, zero = (p[:, None] for p in g.row_params(WEIGHT, 3))
  nearest = (jnp.clip(jnp.round(WEIGHT / scale) + zero, 0, 7) - zero) * scale
  assert hessians.output_error(WEIGHT, result.weight, state) < hessians.output_error(
    WEIGHT, nearest, state
  )
  np.testing.assert_array_equal(result.weight[:, 7], 0)
  assert result.codes.min() >= 0 and result.codes.max() <= 7
  np.testing.assert_array_equal(g.dequantize_groups(*result[1:]), result.weight)
  if 'group_size' in options:
    np.testing.assert_array_equal(result.group, np.arange(12) // 5)
    assert result.scale.shape == (5, 3)


def test_static_groups_keep_their_place_under_act_order():
  result = g.gptq(WEIGHT, STATE.hessian, 4, group_size=4, act_order=True, static_groups=True)
  np.testing.assert_array_equal(result.group, np.arange(12) // 4)
  scale, zero = g.row_params(WEIGHT.reshape(5, 3, 4), 4)
  np.testing.assert_allclose(result.scale, scale, rtol=1e-6)
  np.testing.assert_array_equal(result.zero_point, zero)


def test_row_params_of_zero_and_positive_rows():
  rows = jnp.stack([jnp.zeros(4), jnp.arange(4.0), -jnp.arange(4.0)])
  scale, zero = g.row_params(rows, 2)
  np.testing.assert_allclose(scale, [2 / 3, 1, 1])
  np.testing.assert_array_equal(zero, [2, 0, 3])
  scale, zero = g.row_params(rows, 2, symmetric=True)
  np.testing.assert_allclose(scale, [2 / 3, 2, 2])
  np.testing.assert_array_equal(zero, [2, 2, 2])
  scale, zero = g.row_params(rows, 2, symmetric=True, one_sided=True)
  np.testing.assert_allclose(scale, [2 / 3, 1, 2])


def test_symmetric_rows_without_negatives_do_not_saturate():
  """Half of the codes stand for negative weights; the step has to reach the largest weight with the other."""
  weight = np.float64([[0.8315, 0.4567]])
  step = 2 * weight.max() / 15
  expected = np.clip(np.round(weight / step), -8, 7) * step
  np.testing.assert_allclose(expected, [[0.776, 0.4435]], atol=1e-3)
  found = g.gptq(jnp.asarray(weight, jnp.float32), jnp.eye(2), 4, symmetric=True, damping=0.0)
  np.testing.assert_allclose(found.weight, expected, rtol=1e-5)
  grouped = g.gptq(
    jnp.asarray(np.tile(weight, 2), jnp.float32), jnp.eye(4), 4, symmetric=True, damping=0.0,
    group_size=2,
  )  # fmt: skip
  np.testing.assert_allclose(grouped.weight, np.tile(expected, 2), rtol=1e-5)


@pytest.mark.exhaustive
def test_dense_and_convolution_kernels_in_flax_layout():
  dense = g.gptq_kernel(WEIGHT.T, STATE.hessian, 4)
  result = g.gptq(WEIGHT, STATE.hessian, 4)
  np.testing.assert_array_equal(dense.kernel, result.weight.T)
  np.testing.assert_array_equal(dense.scale, result.scale.T)
  images = jax.random.normal(KEY, (3, 6, 6, 2))
  kernel = jax.random.normal(jax.random.key(3), (3, 3, 2, 4))
  patches = hessians.unfold(images, (3, 3), (2, 2), [(1, 1), (1, 1)])
  assert patches.shape == (3, 3, 3, 18)
  flat = jnp.moveaxis(kernel, -2, 0).reshape(18, 4)
  expected = jax.lax.conv_general_dilated(
    images, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  np.testing.assert_allclose(patches @ flat, expected, rtol=1e-4, atol=1e-4)
  state = hessians.accumulate_hessian(hessians.init_hessian(18), patches)
  conv = g.gptq_kernel(kernel, state.hessian, 8)
  assert conv.kernel.shape == conv.codes.shape == kernel.shape
  np.testing.assert_allclose(conv.kernel, kernel, atol=4 * float(conv.scale.max()))


def test_bfloat16_weights_are_solved_in_float32():
  coarse = WEIGHT.astype(jnp.bfloat16)
  result = g.gptq(coarse, STATE.hessian, 4)
  assert result.weight.dtype == jnp.bfloat16 and result.scale.dtype == jnp.float32
  expected = g.gptq(coarse.astype(jnp.float32), STATE.hessian, 4)
  np.testing.assert_array_equal(result.codes, expected.codes)


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: g.gptq(WEIGHT, STATE.hessian, 1), r'\[2, 16\]; got 1'),
    (lambda: g.gptq(WEIGHT.T, STATE.hessian), r'expected \[out, in\] and \[in, in\]'),
    (lambda: g.gptq(WEIGHT, STATE.hessian, group_size=-1), 'group_size=-1 must be positive'),
    (lambda: g.gptq(WEIGHT, STATE.hessian, damping=-1), 'damping=-1 must not'),
    (lambda: g.gptq(WEIGHT * jnp.nan, STATE.hessian), 'weight holds NaN'),
    (lambda: g.gptq(WEIGHT, STATE.hessian.at[0, 0].set(jnp.inf)), 'hessian holds NaN'),
    (lambda: g.gptq(WEIGHT, -STATE.hessian), 'not positive definite'),
    (
      lambda: hessians.accumulate_hessian(STATE, INPUTS[..., :3]),
      r'expected \[sequences, tokens, 12\]',
    ),
  ],
)
def test_bad_input_is_named(make, match):
  with pytest.raises(ValueError, match=match):
    make()


def test_a_dead_input_counts_in_the_range_of_the_whole_weight_but_not_in_groups():
  hessian = jnp.eye(8).at[3, 3].set(0)
  weight = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32).at[:, 3].set(50)
  whole = g.gptq(weight, hessian, 4)
  np.testing.assert_array_equal(whole.scale[:, 0], g.row_params(weight, 4)[0])
  assert np.all(np.asarray(whole.weight)[:, 3] == 0)
  grouped = g.gptq(weight, hessian, 4, group_size=4, static_groups=True)
  assert np.max(grouped.scale) < 1


def test_an_option_that_does_not_exist_is_named_with_those_that_do():
  with pytest.raises(TypeError, match=r'gptq_kernel has no option group; it has .*group_size'):
    g.gptq_kernel(WEIGHT.T, STATE.hessian, 4, group=4)
