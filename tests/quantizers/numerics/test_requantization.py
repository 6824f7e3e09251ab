import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxlab.quantizers.numerics import requantization as r

FIXED = jax.jit(r.requantize_fixed_point, static_argnames=('low', 'high', 'dtype'))


@golden('quantisers', 'integer_matmul')
@pytest.mark.parametrize('x64', [True, False])
def test_float_and_fixed_point_requantization_agree_with_reference(vectors, x64):
  with jax.enable_x64(x64):
    dtype = jnp.float64 if x64 else jnp.float32
    names = ('out_x_scale', 'out_weight_scale', 'in_bias', 'out_y_scale')
    scales = [jnp.asarray(vectors[name], dtype) for name in names]
    acc = jnp.asarray(vectors['out_accumulator'])
    zero = vectors['out_y_zero_point']
    codes = r.requantize(acc, *r.requantize_constants(*scales), zero)
    assert codes.dtype == jnp.uint8
    np.testing.assert_array_equal(codes, vectors['out_y_codes'])
    constants = r.fixed_point_constants(*(vectors[name] for name in names))
    np.testing.assert_array_equal(constants.multiplier, vectors['out_multiplier_q31'])
    np.testing.assert_array_equal(constants.exponent, vectors['out_multiplier_exponent'])
    np.testing.assert_array_equal(constants.bias, vectors['out_bias_codes'])
    for requantize in (r.requantize_fixed_point, FIXED):
      codes = requantize(acc, constants, zero)
      np.testing.assert_array_equal(codes, vectors['out_y_codes_fixed_point'])


@golden('qwt_v2', 'fold_requant')
@pytest.mark.parametrize('x64', [True, False])
def test_folded_channel_affine_agrees_with_reference(vectors, x64):
  from jaxlab.quantizers.numerics.integers import integer_dot

  rtol = 1e-9 if x64 else 1e-5
  with jax.enable_x64(x64):
    v = {
      name: jnp.asarray(vectors[f'in_{name}'], jnp.float64 if x64 else jnp.float32)
      for name in ('x_scale', 'weight_scale', 'bias', 'gamma', 'beta', 'y_scale')
    }
    x, weight = jnp.asarray(vectors['in_x_codes']), jnp.asarray(vectors['in_weight_codes'])
    acc = integer_dot(x, weight, vectors['in_x_zero_point'])
    np.testing.assert_array_equal(acc, vectors['out_accumulator'])
    scale, bias = r.fold_channel_affine(v['weight_scale'], v['bias'], v['gamma'], v['beta'])
    assert_close(scale, vectors['out_folded_weight_scale'], rtol)
    assert_close(bias, vectors['out_folded_bias'], rtol)
    unfolded = v['gamma'] * (acc * (v['x_scale'] * v['weight_scale']) + v['bias']) + v['beta']
    assert_close(unfolded, vectors['out_y'], rtol)
    assert_close(acc * (v['x_scale'] * scale) + bias, vectors['out_y'], rtol)
    constants = r.requantize_constants(v['x_scale'], scale, bias, v['y_scale'])
    codes = r.requantize(acc, *constants, vectors['in_y_zero_point'])
    np.testing.assert_array_equal(codes, vectors['out_y_codes'])


def vector(low, high):
  return hnp.arrays(np.int64, 32, elements=st.integers(low, high))


@settings(max_examples=20, deadline=None)
@given(
  accumulator=vector(-(2**31), 2**31 - 1),
  multiplier=vector(0, 2**31),
  exponent=vector(-31, 0),
  zero_point=st.integers(-300, 300),
)
def test_halves_of_32_bits_give_the_64_bit_result(accumulator, multiplier, exponent, zero_point):
  constants = r.FixedPoint(
    multiplier.astype(np.uint32), exponent.astype(np.int32), np.zeros(32, np.int32)
  )
  # In NumPy's int64, below 2^63.
  exact = (accumulator * multiplier + 2 ** (30 - exponent)) >> (31 - exponent)
  acc = jnp.asarray(accumulator, jnp.int32)
  narrow = FIXED(acc, constants, zero_point)
  np.testing.assert_array_equal(narrow, np.clip(exact + zero_point, 0, 255))
  wide = FIXED(acc, constants, 0, low=-(2**30), high=2**30, dtype=jnp.int32)
  np.testing.assert_array_equal(wide, np.clip(exact, -(2**30), 2**30))


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-12, 0.99), bias=st.floats(-1, 1))
def test_constants_are_those_of_the_multiplier(scale, bias):
  constants = r.fixed_point_constants(1.0, np.float64([scale]), None, 1.0)
  value = float(constants.multiplier[0]) * 2.0 ** (int(constants.exponent[0]) - 31)
  assert abs(value - scale) <= 2.0**-31 * max(scale, 2.0**-31)
  if abs(bias / scale) < 2**30:
    constants = r.fixed_point_constants(1.0, np.float64([scale]), np.float64([bias]), 1.0)
    assert abs(constants.bias[0] - bias / scale) <= 0.5


@pytest.mark.exhaustive
def test_fixed_point_and_float_differ_by_rounding_alone():
  rng = np.random.default_rng(0)
  acc = jnp.asarray(rng.integers(-(2**20), 2**20, (200, 6)), jnp.int32)
  scales = (0.02, rng.uniform(1e-3, 1e-2, 6), rng.normal(size=6), 3.0)
  fixed = r.requantize_fixed_point(acc, r.fixed_point_constants(*scales), 128)
  multiplier, offset = r.requantize_constants(*scales)
  plain = r.requantize(acc, multiplier, offset, 128)
  difference = np.abs(fixed.astype(np.int32) - plain.astype(np.int32))
  assert difference.max() <= 1 and difference.mean() < 0.01


def test_negative_gamma_flips_codes_and_gives_the_same_output():
  rng = np.random.default_rng(0)
  kernel = jnp.asarray(rng.integers(-127, 128, (8, 4)), jnp.int8)
  scale, bias = r.fold_channel_affine(
    jnp.float32(0.01), None, jnp.array([1.0, -0.5, 2.0, -1.0]), jnp.arange(4.0)
  )
  assert scale.shape == (4,)
  np.testing.assert_array_equal(bias, np.arange(4))
  flipped, positive = r.flip_negative_channels(kernel, scale)
  assert flipped.dtype == jnp.int8 and np.all(positive > 0)
  np.testing.assert_array_equal(flipped * positive, kernel * scale)
  with pytest.raises(ValueError, match=r'Channels \[1, 3\] have a negative scale'):
    r.fixed_point_constants(0.1, scale, bias, 1.0)
  assert np.all(r.fixed_point_constants(0.1, positive, bias, 1.0).multiplier > 0)
  with pytest.raises(ValueError, match=r'Channels \[1\] hold the code -128'):
    r.flip_negative_channels(kernel.at[2, 1].set(-128).at[2, 0].set(-128), scale)
  with pytest.raises(ValueError, match='Unsigned codes'):
    r.flip_negative_channels(kernel.astype(jnp.uint8), scale)


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: r.fixed_point_constants(1.0, np.ones(2), None, 0.5), r'reaches 2.0; fixed point'),
    (lambda: r.fixed_point_constants(1.0, np.array([np.nan]), None, 1.0), 'fixed point takes'),
    (lambda: r.fixed_point_constants(1.0, np.zeros(2), np.ones(2), 1.0), 'scale 0 has a bias'),
    (lambda: r.fixed_point_constants(1e-6, np.full(2, 1e-6), np.ones(2), 1.0), 'not fit int32'),
    (
      lambda: r.requantize_fixed_point(
        jnp.ones((2, 2)), r.fixed_point_constants(0.1, np.ones(2), None, 1.0), 0
      ),
      'accumulator must be int32; got float32',
    ),
  ],
)
def test_bad_input_is_named(make, match):
  with pytest.raises(ValueError, match=match):
    make()
