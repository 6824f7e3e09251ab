import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxlab import quantizers
from jaxlab.quantizers import AffineQuantizer

SSQL_WEIGHT = AffineQuantizer(rule='half_range', granularity='channel', axis=0)
SSQL_ACTIVATION = AffineQuantizer(rule='asymmetric')


@golden('ssql', 'uniform_weight_symmetric_channelwise')
@pytest.mark.parametrize('x64', [True, False])
def test_ssql_weight_rule_agrees_with_reference(vectors, x64):
  rtol = 1e-9 if x64 else 1e-5
  with jax.enable_x64(x64):
    weight = jnp.asarray(vectors['in_weight'], jnp.float64 if x64 else jnp.float32)
    upstream = jnp.asarray(vectors['in_upstream_grad'], weight.dtype)
    for bits in vectors.param('bits'):
      safe = vectors[f'mask_tie_safe_b{bits}']

      def quantized(w, scale_grad, bits=bits):
        params = quantizers.calibrate(SSQL_WEIGHT, w, bits)
        return quantizers.fake_quantize(
          SSQL_WEIGHT, w, params, scale_grad=scale_grad, degenerate='tensor'
        )

      params = quantizers.calibrate(SSQL_WEIGHT, weight, bits)
      codes = quantizers.quantize(SSQL_WEIGHT, weight, params, dtype=None)
      assert_close(params.scale.ravel(), vectors[f'out_scale_b{bits}'], rtol)
      assert_close(codes, vectors[f'out_codes_b{bits}'], rtol, where=safe)
      assert_close(quantized(weight, False), vectors[f'out_dequant_b{bits}'], rtol, where=safe)
      for name, scale_grad in (('through', True), ('detached', False)):
        _, pullback = jax.vjp(lambda w, g=scale_grad: quantized(w, g), weight)
        expected = vectors[f'grad_weight_{name}_scale_b{bits}']
        assert_close(pullback(upstream)[0], expected, rtol, where=safe)


@golden('ssql', 'uniform_act_asymmetric_layerwise')
@pytest.mark.parametrize('x64', [True, False])
def test_ssql_activation_rule_agrees_with_reference(vectors, x64):
  rtol = 1e-9 if x64 else 1e-5
  with jax.enable_x64(x64):
    dtype = jnp.float64 if x64 else jnp.float32
    views = [jnp.asarray(vectors[f'in_view{i}'], dtype) for i in (1, 2)]
    ranges = [quantizers.min_max(SSQL_ACTIVATION, view) for view in views]
    minimum = jnp.minimum(ranges[0][0], ranges[1][0])
    maximum = jnp.maximum(ranges[0][1], ranges[1][1])
    assert_close(minimum.squeeze(), vectors['out_min'], rtol)
    assert_close(maximum.squeeze(), vectors['out_max'], rtol)
    x, upstream = (jnp.asarray(vectors[name], dtype) for name in ('in_apply', 'in_upstream_grad'))
    for bits in vectors.param('bits'):
      params = quantizers.params_from_range(SSQL_ACTIVATION, minimum, maximum, bits)
      out, pullback = jax.vjp(
        lambda x, p=params: quantizers.fake_quantize(SSQL_ACTIVATION, x, p), x
      )
      safe = vectors[f'mask_tie_safe_b{bits}']
      assert_close(params.scale.squeeze(), vectors[f'out_scale_b{bits}'], rtol)
      assert_close(params.zero_point.squeeze(), vectors[f'out_zero_point_b{bits}'], rtol)
      assert_close(out, vectors[f'out_dequant_b{bits}'], rtol, where=safe)
      assert_close(pullback(upstream)[0], vectors[f'grad_input_b{bits}'], rtol, where=safe)


@golden('quantisers', 'fake_quant_affine')
def test_fake_quantize_agrees_with_pytorch_operators(vectors):
  x, upstream = jnp.asarray(vectors['in_x']), jnp.asarray(vectors['in_upstream'])
  for bits in vectors.param('bits'):
    for kind, signed in (('tensor', False), ('channel', True)):
      scale = jnp.asarray(vectors[f'param_scale_{kind}_b{bits}'])
      if kind == 'channel':
        scale = scale[:, None]
      zero_point = jnp.float32(vectors.get(f'param_zero_point_{kind}_b{bits}', 0))
      low, high = quantizers.code_range(bits, signed)
      out, pullback = jax.vjp(
        lambda x, s=scale, z=zero_point, lo=low, hi=high: quantizers.affine_fake_quantize(
          x, s, z, lo, hi
        ),
        x,
      )
      safe = vectors[f'mask_tie_safe_{kind}_b{bits}']
      assert_close(out, vectors[f'out_{kind}_b{bits}'], where=safe)
      assert_close(pullback(upstream)[0], vectors[f'grad_{kind}_b{bits}'], where=safe)


SPECS = [
  AffineQuantizer(rule=rule, bits=bits, **granularity)
  for rule, bits, granularity in itertools.product(
    ['symmetric', 'half_range', 'asymmetric', 'asymmetric_clipped'],
    [2, 8],
    [
      {},
      {'granularity': 'channel', 'axis': 1},
      {'granularity': 'token', 'axis': -1},
      {'granularity': 'group', 'axis': 0, 'group_size': 3},
    ],
  )
]
MATRICES = hnp.arrays(
  np.float32, (6, 4), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
)


@settings(max_examples=20, deadline=None)
@given(x=MATRICES, spec=st.sampled_from(SPECS))
def test_fake_quantize_is_dequantize_of_quantize_bit_for_bit(x, spec):
  params = quantizers.calibrate(spec, x)
  codes = quantizers.quantize(spec, x, params)
  low, high = quantizers.code_range(spec.bits, spec.signed)
  assert codes.min() >= low and codes.max() <= high
  fake = quantizers.fake_quantize(spec, x, params)
  scale = jnp.broadcast_to(
    params.scale, quantizers.numerics.affine.cut_groups(spec, jnp.asarray(x)).shape
  ).reshape(x.shape)
  assert np.all(np.asarray(scale) > 0)
  np.testing.assert_array_equal(fake, quantizers.dequantize(spec, codes, params))


@settings(max_examples=15, deadline=None)
@given(x=MATRICES, spec=st.sampled_from([s for s in SPECS if s.rule != 'asymmetric_clipped']))
def test_error_is_at_most_half_a_step_inside_the_range(x, spec):
  params = quantizers.calibrate(spec, x)
  fake = quantizers.fake_quantize(spec, x, params)
  error = jnp.abs(quantizers.numerics.affine.cut_groups(spec, fake - x))
  # A half-range extreme is clipped from half a step above the last code; an asymmetric range whose
  # zero point was rounded is clipped by at most half a step at one end.
  steps = 0.5 if spec.rule == 'symmetric' else 1.0
  spare = 1e-5 * jnp.max(jnp.abs(x)) + 1e-30
  assert jnp.all(error <= steps * params.scale * (1 + 1e-3) + spare)


def test_bits_may_be_traced_and_do_not_recompile():
  x = jax.random.normal(jax.random.key(0), (32, 8))
  spec = AffineQuantizer(rule='half_range', granularity='channel')

  traced = []

  def loss(x, bits):
    traced.append(bits)
    return jnp.sum(quantizers.fake_quantize(spec, x, quantizers.calibrate(spec, x, bits)) ** 2)

  step = jax.jit(jax.value_and_grad(loss))
  for bits in (2, 3, 5, 8):
    value, _ = step(x, jnp.int32(bits))
    static = quantizers.calibrate(AffineQuantizer(bits, 'half_range', 'channel'), x)
    expected = jnp.sum(quantizers.fake_quantize(spec, x, static) ** 2)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
  assert len(traced) == 1


def test_group_scales_belong_to_runs_of_the_axis():
  x = jnp.concatenate([jnp.ones((3, 2)), 100 * jnp.ones((3, 2))])
  spec = AffineQuantizer(8, granularity='group', axis=0, group_size=3)
  params = quantizers.calibrate(spec, x)
  assert params.scale.shape == (2, 1, 2)
  np.testing.assert_allclose(params.scale[:, 0, 0], [1 / 127, 100 / 127], rtol=1e-6)
  np.testing.assert_allclose(quantizers.fake_quantize(spec, x, params), x, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(extreme=st.floats(2**-20, 2**20, width=32), bits=st.integers(2, 8))
def test_the_tie_of_a_half_range_extreme_is_rounded_outwards(extreme, bits):
  quantizer = AffineQuantizer(bits, 'half_range')
  x = jnp.array([-extreme, extreme, 0.0], jnp.float32)
  for params in (
    quantizers.calibrate(quantizer, x),
    jax.jit(quantizers.calibrate, static_argnums=0)(quantizer, x),
  ):
    codes = quantizers.quantize(quantizer, x, params)
    np.testing.assert_array_equal(codes, [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0])


def test_any_empty_range_returns_the_whole_tensor_under_ssql_rule():
  x = jax.random.normal(jax.random.key(0), (4, 3)).at[:, 1].set(0.0)
  spec = AffineQuantizer(2, 'half_range', 'channel')
  params = quantizers.calibrate(spec, x, on_degenerate='identity')
  whole = quantizers.fake_quantize(spec, x, params, degenerate='tensor')
  np.testing.assert_array_equal(whole, x)
  per_element = quantizers.fake_quantize(spec, x, params)
  assert not np.array_equal(per_element, x)
  for scale_grad, degenerate in itertools.product((True, False), ('tensor', 'element')):

    def total(x, scale_grad=scale_grad, degenerate=degenerate):
      params = quantizers.calibrate(spec, x, on_degenerate='identity')
      return quantizers.fake_quantize(
        spec, x, params, scale_grad=scale_grad, degenerate=degenerate
      ).sum()

    assert np.all(np.isfinite(jax.jit(jax.grad(total))(x)))


def test_bfloat16_is_computed_in_float32_and_returned_as_it_came():
  x = jax.random.normal(jax.random.key(0), (64, 4), jnp.bfloat16)
  spec = AffineQuantizer(4, 'asymmetric', 'channel')
  params = quantizers.calibrate(spec, x)
  fake = quantizers.fake_quantize(spec, x, params)
  assert fake.dtype == jnp.bfloat16 and params.scale.dtype == jnp.float32
  expected = quantizers.fake_quantize(spec, x.astype(jnp.float32), params)
  np.testing.assert_array_equal(fake, expected.astype(jnp.bfloat16))


@pytest.mark.exhaustive
def test_vmap_over_bits_equals_a_loop():
  x = jax.random.normal(jax.random.key(0), (5, 7))
  spec = AffineQuantizer(rule='asymmetric')

  def fake(bits):
    return quantizers.fake_quantize(spec, x, quantizers.calibrate(spec, x, bits))

  bits = jnp.array([2, 4, 8])
  np.testing.assert_array_equal(jax.vmap(fake)(bits), jnp.stack([fake(int(b)) for b in bits]))


def test_gradient_is_one_at_both_bounds_and_zero_beyond():
  x = jnp.array([-3.0, -2.0, 0.2, 1.0, 1.6])
  gradient = jax.grad(lambda x: quantizers.affine_fake_quantize(x, 1.0, 0.0, -2.0, 1.0).sum())(x)
  np.testing.assert_array_equal(gradient, [0, 1, 1, 1, 0])


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: AffineQuantizer(bits=0), r'bits must lie in \[1, 16\]; got 0'),
    (lambda: AffineQuantizer(bits=17), 'got 17'),
    (lambda: AffineQuantizer(bits=2.5), 'whole numbers; got 2.5'),
    (
      lambda: AffineQuantizer(bits=1),
      "rule='symmetric' has signed codes and needs at least 2 bits",
    ),
    (
      lambda: quantizers.calibrate(AffineQuantizer(8, 'half_range'), jnp.ones(2), bits=1),
      'got bits=1',
    ),
    (lambda: AffineQuantizer(rule='asymmetric', narrow=True), 'signed codes'),
    (lambda: AffineQuantizer(rule='symetric'), "rule='symetric' is none of"),
    (lambda: AffineQuantizer(granularity='row'), "granularity='row'"),
    (lambda: AffineQuantizer(granularity='group'), 'group_size goes with'),
    (lambda: AffineQuantizer(group_size=4), 'group_size goes with'),
    (
      lambda: quantizers.calibrate(
        AffineQuantizer(granularity='channel', axis=2), jnp.ones((2, 2))
      ),
      'axis=2 is not an axis',
    ),
    (
      lambda: quantizers.calibrate(
        AffineQuantizer(granularity='group', axis=0, group_size=4), jnp.ones((6, 2))
      ),
      'group_size=4 does not divide',
    ),
    (lambda: quantizers.calibrate(AffineQuantizer(), jnp.array([0.0, jnp.nan])), 'not finite'),
    (
      lambda: quantizers.params_from_range(AffineQuantizer(), jnp.float32(2), jnp.float32(1)),
      'minimum 2.0 lies above',
    ),
    (
      lambda: quantizers.quantize(
        AffineQuantizer(8, 'asymmetric'),
        jnp.ones(3),
        quantizers.calibrate(AffineQuantizer(8, 'asymmetric'), jnp.arange(3.0)),
        dtype=jnp.int8,
      ),
      'int8 does not hold 8-bit unsigned',
    ),
  ],
)
def test_bad_input_is_named(make, match):
  with pytest.raises(ValueError, match=match):
    make()


def test_codes_that_the_dtype_does_not_hold_are_refused():
  quantizer = AffineQuantizer(bits=4)
  x = jnp.array([-1.0, 0.3, 1.0])
  params = quantizers.calibrate(quantizer, x, bits=12)
  with pytest.raises(ValueError, match='int8 does not hold the codes'):
    quantizers.quantize(quantizer, x, params, jnp.int8)


@pytest.mark.parametrize(
  ('rule', 'flat', 'steps'), [('symmetric', 0.0, 7.0), ('asymmetric', 2.0, 15.0)]
)
def test_ranges_without_extent_raise_if_asked_to(rule, flat, steps):
  quantizer = AffineQuantizer(4, rule, 'channel')
  # Extents that steps divide: traced or not, by whichever instruction, scales are the same.
  x = jnp.array([[steps, flat, -steps], [2 * steps, flat, steps]])
  params = quantizers.calibrate(quantizer, x)
  np.testing.assert_allclose(quantizers.fake_quantize(quantizer, x, params)[:, 1], flat, rtol=1e-6)
  with pytest.raises(ValueError, match=r'1 of 3 ranges have no extent \(index \[1\]\)'):
    quantizers.calibrate(quantizer, x, on_degenerate='error')
  quantizers.calibrate(quantizer, x[:, ::2], on_degenerate='error')
  traced = jax.jit(lambda x: quantizers.calibrate(quantizer, x, on_degenerate='error'))(x)
  np.testing.assert_array_equal(traced.scale, params.scale)
  with pytest.raises(ValueError, match="on_degenerate='skip'"):
    quantizers.calibrate(quantizer, x, on_degenerate='skip')


@pytest.mark.parametrize('degenerate', ['element', 'tensor'])
@pytest.mark.parametrize('scale_grad', [True, False])
def test_forward_mode_gives_the_gradient_of_reverse_mode(degenerate, scale_grad):
  rule = AffineQuantizer(3, 'half_range', 'channel')
  x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
  x = x.at[:, 1].set(0) if degenerate == 'element' else x
  upstream = jnp.arange(1.0, 25.0).reshape(6, 4)

  def loss(x):
    params = quantizers.calibrate(rule, x)
    y = quantizers.fake_quantize(rule, x, params, scale_grad=scale_grad, degenerate=degenerate)
    return jnp.sum(upstream * y)

  reverse = jax.jit(jax.grad(loss))(x)
  np.testing.assert_allclose(jax.jit(jax.jacfwd(loss))(x), reverse, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), reverse, rtol=1e-5, atol=1e-4)


def clipped(x, bits, minimum, maximum):
  """Float64: codes `[0, 2^b - 1]` of a range that is widened to hold 0."""
  minimum, maximum = min(minimum, 0), max(maximum, 0)
  scale = (maximum - minimum) / (2**bits - 1)
  zero_point = np.round(-minimum / scale)
  return (np.clip(np.round(x / scale) + zero_point, 0, 2**bits - 1) - zero_point) * scale


@pytest.mark.parametrize('sign', [1, -1])
def test_zero_is_a_code_of_clipped_ranges(sign):
  x = sign * np.linspace(0.8, 1.2, 100)
  quantizer = AffineQuantizer(8, 'asymmetric_clipped')
  params = quantizers.calibrate(quantizer, jnp.asarray(x, jnp.float32))
  both = np.concatenate([x, [0.0]])
  found = quantizers.fake_quantize(quantizer, jnp.asarray(both, jnp.float32), params)
  assert_close(found, clipped(both, 8, x.min(), x.max()), 1e-5)
  assert found[-1] == 0 and np.abs(found[:-1] - x).max() < 1.2 / 255
  reference = AffineQuantizer(8, 'asymmetric_clipped', hold_zero=False)
  params = quantizers.calibrate(reference, jnp.asarray(x, jnp.float32))
  saturated = quantizers.fake_quantize(reference, jnp.asarray(x, jnp.float32), params)
  assert (sign > 0 and len(np.unique(saturated)) == 1) or np.abs(saturated - x).max() > 0.3


@pytest.mark.parametrize('size', [1e-3, 1e-8, 1e-20])
def test_small_values_keep_their_codes(size):
  x = size * jnp.linspace(-1, 1, 33)
  for rule in ('symmetric', 'half_range', 'asymmetric', 'asymmetric_clipped'):
    quantizer = AffineQuantizer(8, rule)
    found = quantizers.fake_quantize(quantizer, x, quantizers.calibrate(quantizer, x))
    assert np.abs(found - x).max() <= size / 127


@pytest.mark.parametrize('value', [5.0, -3.0, 0.0, 1e-30])
@pytest.mark.parametrize('bits', [2, 8])
@pytest.mark.parametrize('rule', ['symmetric', 'asymmetric', 'asymmetric_clipped'])
def test_constants_are_codes(rule, bits, value):
  quantizer = AffineQuantizer(bits, rule)
  x = jnp.full((3, 4), value)
  for calibrate in (quantizers.calibrate, jax.jit(quantizers.calibrate, static_argnums=0)):
    params = calibrate(quantizer, x)
    assert params.scale > 0
    codes = quantizers.quantize(quantizer, x, params)
    found = quantizers.dequantize(quantizer, codes, params)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    np.testing.assert_array_equal(quantizers.fake_quantize(quantizer, x, params), found)
    gradient = jax.grad(lambda x, p=params: quantizers.fake_quantize(quantizer, x, p).sum())(x)
    np.testing.assert_array_equal(gradient, 1)


def test_a_dead_channel_leaves_the_scales_of_the_others():
  x = jax.random.normal(jax.random.key(0), (16, 3)).at[:, 1].set(0)
  for rule in ('symmetric', 'half_range', 'asymmetric', 'asymmetric_clipped'):
    quantizer = AffineQuantizer(4, rule, 'channel')
    params = quantizers.calibrate(quantizer, x)
    assert params.scale[0, 1] == 1
    alone = quantizers.calibrate(quantizer, x[:, ::2])
    np.testing.assert_array_equal(params.scale[:, ::2], alone.scale)
    found = quantizers.fake_quantize(quantizer, x, params)
    np.testing.assert_array_equal(found[:, 1], 0)
    np.testing.assert_array_equal(
      found[:, ::2], quantizers.fake_quantize(quantizer, x[:, ::2], alone)
    )


def test_several_axes_have_scales_of_their_own():
  x = jax.random.normal(jax.random.key(0), (5, 2, 3)) * jnp.arange(1.0, 7.0).reshape(2, 3)
  quantizer = AffineQuantizer(4, granularity='channel', axis=(-2, -1))
  params = quantizers.calibrate(quantizer, x)
  np.testing.assert_allclose(params.scale, np.abs(x).max(0, keepdims=True) / 7, rtol=1e-6)
  with pytest.raises(ValueError, match="several axes go with granularity='channel'"):
    AffineQuantizer(4, granularity='token', axis=(-2, -1))
  with pytest.raises(ValueError, match='axis=3 is not an axis'):
    quantizers.calibrate(AffineQuantizer(4, granularity='channel', axis=(0, 3)), x)


def test_ranges_of_power_of_two_factors_hold_zero():
  x = jnp.asarray(np.random.default_rng(0).uniform(0.8, 1.2, (64, 4)), jnp.float32)
  params = quantizers.power_of_two_factor(x, 8)
  found = quantizers.fake_quantize(AffineQuantizer(rule='asymmetric_clipped'), x, params)
  assert np.abs(found - x).max() < 1.2 / 255
