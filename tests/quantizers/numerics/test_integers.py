import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import tables
from golden_vectors import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxlab.quantizers import AffineParams, AffineQuantizer
from jaxlab.quantizers.numerics import affine, integers

X_RULE = AffineQuantizer(8, 'asymmetric')
W_RULE = AffineQuantizer(8, 'symmetric', 'channel')
RNG = np.random.default_rng(0)


@golden('quantisers', 'integer_matmul')
@pytest.mark.parametrize('x64', [True, False])
def test_codes_and_accumulator_agree_with_reference(vectors, x64):
  rtol = 1e-9 if x64 else 1e-5
  with jax.enable_x64(x64):
    x, weight = (
      jnp.asarray(vectors[f'in_{name}'], jnp.float64 if x64 else jnp.float32)
      for name in ('x', 'weight')
    )
    x_rule = AffineQuantizer(vectors.param('act_bits'), 'asymmetric')
    w_rule = AffineQuantizer(vectors.param('weight_bits'), 'symmetric', 'channel')
    x_params, w_params = affine.calibrate(x_rule, x), affine.calibrate(w_rule, weight)
    assert_close(x_params.scale.squeeze(), vectors['out_x_scale'], rtol)
    assert_close(x_params.zero_point.squeeze(), vectors['out_x_zero_point'], rtol)
    assert_close(w_params.scale.squeeze(), vectors['out_weight_scale'], rtol)
    x_codes = affine.quantize(x_rule, x, x_params, jnp.uint8)
    w_codes = affine.quantize(w_rule, weight, w_params, jnp.int8)
    np.testing.assert_array_equal(x_codes, vectors['out_x_codes'])
    np.testing.assert_array_equal(w_codes, vectors['out_weight_codes'])
    acc = integers.integer_dot(x_codes, w_codes, x_params.zero_point.squeeze())
    assert acc.dtype == jnp.int32
    np.testing.assert_array_equal(acc, vectors['out_accumulator'])
    y = acc * (x_params.scale * w_params.scale) + jnp.asarray(vectors['in_bias'], x.dtype)
    assert_close(y, vectors['out_y'], rtol)
    fake = affine.fake_quantize(x_rule, x, x_params) @ affine.fake_quantize(
      w_rule, weight, w_params
    )
    assert_close(fake + vectors['in_bias'], vectors['out_y'], rtol)


@golden('quantisers', 'integer_matmul')
def test_packed_bytes_agree_with_reference(vectors):
  codes = jnp.asarray(vectors['in_int4_codes'])
  packed = integers.pack_int4(codes)
  assert packed.dtype == jnp.uint8
  np.testing.assert_array_equal(packed, vectors['out_int4_packed'])
  np.testing.assert_array_equal(integers.unpack_int4(packed, codes.shape[0]), codes)


def codes(shape, unsigned):
  low, high = (0, 256) if unsigned else (-128, 128)
  return RNG.integers(low, high, shape).astype(np.uint8 if unsigned else np.int8)


@pytest.mark.parametrize('x_unsigned', [True, False])
@pytest.mark.parametrize('w_unsigned', [True, False])
def test_dots_of_codes_are_exact(x_unsigned, w_unsigned):
  x, w = codes((2, 3, 16), x_unsigned), codes((16, 5), w_unsigned)
  z_w = RNG.integers(-5, 260, 5)
  exact = (x.astype(np.int64) - 37) @ (w.astype(np.int64) - z_w)
  for dot in (integers.integer_dot, jax.jit(integers.integer_dot)):
    np.testing.assert_array_equal(dot(x, w, 37, z_w), exact)
    np.testing.assert_array_equal(dot(x, w, 37), (x.astype(np.int64) - 37) @ w.astype(np.int64))


@pytest.mark.parametrize(
  ('groups', 'strides', 'padding', 'dilation'),
  [
    (1, (1, 1), 'SAME', (1, 1)),
    (2, (2, 2), [(1, 1), (1, 1)], (1, 2)),
    (4, (2, 1), 'VALID', (1, 1)),
  ],
)
@pytest.mark.parametrize('w_unsigned', tables.first([True, False]))
def test_convolutions_of_codes_are_exact(groups, strides, padding, dilation, w_unsigned):
  x, w = codes((2, 6, 7, 4), True), codes((3, 3, 4 // groups, 8), w_unsigned)
  options = {'padding': padding, 'strides': strides, 'dilation': dilation, 'groups': groups}
  for z_w in (None, RNG.integers(-5, 260, 8)):
    exact = jax.lax.conv_general_dilated(
      x.astype(np.int32) - 131,
      w.astype(np.int32) - (0 if z_w is None else z_w.astype(np.int32)),
      strides,
      padding,
      rhs_dilation=dilation,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )
    acc = integers.integer_conv(x, w, 131, z_w, **options)
    assert acc.dtype == jnp.int32
    np.testing.assert_array_equal(acc, exact)


def test_grouped_dot_is_the_dot_of_the_dequantized():
  rule = AffineQuantizer(4, 'asymmetric', 'group', axis=0, group_size=4)
  weight = jnp.asarray(RNG.normal(size=(16, 5)), jnp.float32)
  params = affine.calibrate(rule, weight)
  w = affine.quantize(rule, weight, params, jnp.uint8)
  x = codes((3, 16), True)
  scale, zero = params.scale[:, 0], params.zero_point[:, 0]
  out = integers.grouped_integer_dot(x, w, scale, 99, zero)
  expected = (x.astype(np.float32) - 99) @ affine.dequantize(rule, w, params)
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-2)
  plain = integers.grouped_integer_dot(x, w, scale, 99)
  exact = (x.astype(np.float32) - 99) @ (w * jnp.repeat(scale, 4, 0))
  np.testing.assert_allclose(plain, exact, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
  ('bits', 'granularity'), tables.cells([3, 4, 8], ['tensor', 'channel', 'group'], 3)
)
def test_qwix_arrays_hold_the_same_values_and_give_the_same_dot(bits, granularity):
  group = {'axis': 0, 'group_size': 128} if granularity == 'group' else {}
  rule = AffineQuantizer(bits, 'symmetric', granularity, **group)
  weight = jnp.asarray(RNG.normal(size=(256, 6)), jnp.float32)
  params = affine.calibrate(rule, weight)
  array = integers.as_qarray(rule, weight, params)
  assert array.qvalue.dtype == (jnp.int4 if bits <= 4 else jnp.int8)
  np.testing.assert_array_equal(qwix.dequantize(array), affine.fake_quantize(rule, weight, params))
  x = codes((3, 256), True)
  scale = jnp.full((1, 1), 0.02)
  shifted = qwix.QArray(jnp.asarray(x.astype(np.int16) - 128, jnp.int8), scale, jnp.int8([[3]]))
  theirs = qwix.dot_general(shifted, array, (((1,), (0,)), ((), ())))
  int8 = affine.quantize(rule, weight, params, jnp.int8)
  if granularity == 'group':
    ours = integers.grouped_integer_dot(x, int8, array.scale, 131) * 0.02
  else:
    ours = integers.integer_dot(x, int8, 131) * (0.02 * params.scale)
  np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5 * float(abs(ours).max()))


@settings(max_examples=16, deadline=None)
@given(
  x=hnp.arrays(np.int8, (7, 3), elements=st.integers(-8, 7)),
  size=st.sampled_from([6, 7]),
  axis=st.sampled_from([1, -2]),
)
def test_packing_round_trips_signed_and_unsigned(x, size, axis):
  x = x[:size]
  length = x.shape[axis]
  packed = integers.pack_int4(jnp.asarray(x), axis)
  assert packed.nbytes == -(-length // 2) * (x.size // length)
  np.testing.assert_array_equal(integers.unpack_int4(packed, length, axis=axis), x)
  unsigned = (x + 8).astype(np.uint8)
  packed = integers.pack_int4(jnp.asarray(unsigned), axis)
  np.testing.assert_array_equal(
    integers.unpack_int4(packed, length, axis=axis, signed=False), unsigned
  )


BYTES = jnp.zeros((3, 4), jnp.uint8)
FOUR_BITS = AffineQuantizer(bits=4)
SIGNED = jnp.zeros((4, 2), jnp.int8)


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: integers.integer_dot(BYTES, SIGNED.T), r'expected \[..., in\] and \[in, out\]'),
    (lambda: integers.integer_dot(BYTES.astype(jnp.int32), SIGNED), 'x must hold int8 or uint8'),
    (lambda: integers.integer_dot(BYTES, SIGNED, 1.5), 'x_zero_point must be a whole number'),
    (lambda: integers.integer_dot(BYTES, SIGNED, jnp.arange(4)), 'must be a scalar'),
    (
      lambda: integers.integer_dot(
        jnp.zeros((1, 65794), jnp.uint8), jnp.zeros((65794, 1), jnp.int8)
      ),
      'may overflow',
    ),
    (lambda: integers.integer_dot(BYTES, SIGNED, -30_000_000), 'may overflow'),
    (
      lambda: integers.grouped_integer_dot(BYTES[:, :3], SIGNED, jnp.ones((2, 2))),
      r'expected \[..., in\] and \[in, out\]',
    ),
    (
      lambda: integers.as_qarray(
        FOUR_BITS, jnp.ones((4, 2)), affine.calibrate(FOUR_BITS, jnp.ones((4, 2)), bits=8)
      ),
      'codes up to 127.0, the quantizer for 7',
    ),
    (lambda: integers.integer_conv(BYTES, SIGNED), r'expected \[batch, \*positions'),
    (
      lambda: integers.integer_conv(
        jnp.zeros((1, 3, 3, 1), jnp.uint8), jnp.zeros((1, 1, 1, 1), jnp.int32)
      ),
      'kernel must hold int8 or uint8',
    ),
    (
      lambda: integers.integer_conv(
        jnp.zeros((1, 3, 3, 1), jnp.uint8), jnp.zeros((1, 1, 1, 1), jnp.int8), 300
      ),
      'x_zero_point is no code',
    ),
    (lambda: integers.grouped_integer_dot(BYTES, SIGNED, jnp.ones((3, 2))), '3 groups of scales'),
    (lambda: integers.pack_int4(jnp.array([[8], [-1]])), r'codes in \[-1, 8\] are not 4-bit'),
    (lambda: integers.pack_int4(jnp.ones((2, 2))), 'codes must be integers'),
    (lambda: integers.unpack_int4(BYTES, 7), 'expected 4 bytes'),
    (
      lambda: integers.as_qarray(X_RULE, jnp.ones((2, 2)), AffineParams(1.0, 0.0, 0.0, 255.0)),
      'symmetric and of at most 8 bits',
    ),
  ],
)
def test_bad_input_is_named(make, match):
  with pytest.raises(ValueError, match=match):
    make()
