import compilations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxlab.quantizers.numerics import logarithmic as log

ATTENTION = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (2, 3, 16, 16)))


@golden('quantisers', 'omse_percentile_log2')
def test_log2_agrees_with_fq_vit(vectors):
  x = jnp.asarray(vectors['in_attention'])
  out = log.log2_fake_quantize(x, vectors.param('bits'))
  assert_close(out, vectors['out_log2_dequant'], 2e-6, where=vectors['mask_tie_safe_log2'])


@golden('qwt', 'log_sqrt2')
@pytest.mark.parametrize('x64', [True, False])
def test_log_sqrt2_and_its_gradient_agree_with_qwt(vectors, x64):
  rtol = 1e-9 if x64 else 1e-5
  with jax.enable_x64(x64):
    x, upstream = (
      jnp.asarray(vectors[name], jnp.float64 if x64 else jnp.float32)
      for name in ('in_attention', 'in_upstream')
    )
    for bits in vectors.param('bits'):
      safe = vectors[f'mask_tie_safe_b{bits}']
      scale = log.log_sqrt2_scale(x, bits)
      assert_close(scale, vectors[f'out_delta_b{bits}'], rtol)
      out, pullback = jax.vjp(lambda x, s=scale, b=bits: log.log_sqrt2_fake_quantize(x, s, b), x)
      assert_close(out, vectors[f'out_dequant_b{bits}'], rtol, where=safe)
      # The reference's own derivative differs from its closed form in the ninth digit.
      gradient = pullback(upstream)[0]
      assert_close(gradient, vectors[f'grad_attention_b{bits}'], max(rtol, 1e-8), where=safe)


WEIGHTS = hnp.arrays(np.float32, 12, elements=st.floats(0, 1, width=32, allow_subnormal=False))


@settings(max_examples=12, deadline=None)
@given(x=WEIGHTS, bits=st.integers(1, 8), scale=st.floats(2**-6, 1, width=32))
def test_fake_quantize_is_dequantize_of_quantize_bit_for_bit(x, bits, scale):
  scale = jnp.float32(scale)
  codes = log.log2_quantize(x, bits)
  np.testing.assert_array_equal(log.log2_fake_quantize(x, bits), log.log2_dequantize(codes, bits))
  assert codes.min() >= 0 and codes.max() <= 2**bits
  codes = log.log_sqrt2_quantize(x, scale, bits)
  np.testing.assert_array_equal(
    log.log_sqrt2_fake_quantize(x, scale, bits), log.log_sqrt2_dequantize(codes, scale, bits)
  )
  assert codes.min() >= 0 and codes.max() <= 2**bits


@settings(max_examples=10, deadline=None)
@given(bits=st.integers(1, 6), data=st.data())
def test_every_code_survives_the_round_trip(bits, data):
  # Codes of ratios below the smallest one, 2^-19.9, are never given out.
  codes = np.arange(40) % 2**bits
  np.testing.assert_array_equal(log.log2_quantize(log.log2_dequantize(codes, bits), bits), codes)
  scale = jnp.float32(data.draw(st.floats(2**-10, 2**10, width=32)))
  values = log.log_sqrt2_dequantize(codes, scale, bits)
  np.testing.assert_array_equal(log.log_sqrt2_quantize(values, scale, bits), codes)


def test_relative_error_is_at_most_half_a_step_above_the_last_code():
  for name, ratio in (('log2', 2**0.5), ('log_sqrt2', 2**0.25)):
    x = ATTENTION / ATTENTION.max()
    if name == 'log2':
      out = log.log2_fake_quantize(x, 4)
    else:
      out = log.log_sqrt2_fake_quantize(x, jnp.float32(1), 4)
    live = np.asarray(out > 0)
    error = np.asarray(out)[live] / np.asarray(x)[live]
    assert np.all(error <= ratio * (1 + 1e-5)) and np.all(error >= (1 - 1e-5) / ratio)


def test_zeros_stay_zero_and_have_no_gradient():
  x = jnp.array([0.0, 1e-30, 0.3])
  for fake in (
    lambda x: log.log2_fake_quantize(x, 4),
    lambda x: log.log_sqrt2_fake_quantize(x, jnp.float32(0.5), 4),
  ):
    np.testing.assert_array_equal(fake(x)[:2], [0, 0])
    gradient = jax.jit(jax.grad(lambda x, f=fake: f(x).sum()))(x)
    np.testing.assert_array_equal(gradient[:2], [0, 0])
    assert np.isfinite(gradient[2]) and gradient[2] != 0
  np.testing.assert_array_equal(log.log_sqrt2_fake_quantize(x, jnp.float32(0), 4), [0, 0, 0])
  # With more codes than 40 the smallest ratio has one, as in QwT's code.
  assert log.log_sqrt2_quantize(x, jnp.float32(0.5), 6)[0] == 40


def test_log2_gradient_is_the_secant_inside_and_zero_beyond():
  x = jnp.array([0.3, 3.0, 2**-6])
  gradient = jax.grad(lambda x: log.log2_fake_quantize(x, 2).sum())(x)
  np.testing.assert_allclose(gradient, [0.25 / 0.3, 0, 0], rtol=1e-6)


def test_bits_may_be_traced_and_mapped():
  @jax.jit
  def fake(bits):
    return log.log_sqrt2_fake_quantize(ATTENTION, log.log_sqrt2_scale(ATTENTION, bits), bits)

  bits = jnp.array([2, 4, 8])
  with compilations.counted() as count:
    loop = jnp.stack([fake(b) for b in bits])
  assert count['fake'] == 1
  np.testing.assert_allclose(jax.vmap(fake)(bits), loop, rtol=1e-6)
  scale = log.log_sqrt2_scale(ATTENTION, 4)
  np.testing.assert_allclose(log.log_sqrt2_fake_quantize(ATTENTION, scale, 4), loop[1], rtol=1e-6)
  errors = jnp.mean((loop - ATTENTION) ** 2, (1, 2, 3, 4))
  assert errors[0] > errors[1] > errors[2]


def test_bfloat16_is_computed_in_float32_and_returned_as_it_came():
  x = ATTENTION.astype(jnp.bfloat16)
  scale = log.log_sqrt2_scale(x, 4)
  assert scale.dtype == jnp.float32
  for fake in (
    lambda x: log.log2_fake_quantize(x, 4),
    lambda x: log.log_sqrt2_fake_quantize(x, scale, 4),
  ):
    out = fake(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, fake(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: log.log2_fake_quantize(ATTENTION, 0), r'bits must lie in \[1, 16\]; got 0'),
    (lambda: log.log_sqrt2_scale(ATTENTION, 17), 'got 17'),
    (lambda: log.log_sqrt2_scale(ATTENTION, 4, quantiles=()), 'at least one'),
    (lambda: log.log_sqrt2_scale(ATTENTION, 4, quantiles=(1.5,)), r'\(0, 1\]'),
    (lambda: log.log_sqrt2_scale(jnp.zeros(9), 4), 'finite and positive'),
    (lambda: log.log_sqrt2_scale(ATTENTION.at[0].set(jnp.nan), 4), 'finite and positive'),
    (lambda: log.log2_quantize(ATTENTION, 8, jnp.uint8), 'uint8 does not hold the code 256'),
    (lambda: log.log2_quantize(jnp.arange(3), 4), 'x must be a float array; got int32'),
  ],
)
def test_bad_input_is_named(make, match):
  with pytest.raises(ValueError, match=match):
    make()
