import compilations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxlab.quantizers.numerics import affine, learned

PRECISIONS = pytest.mark.parametrize('x64', [True, False])


def arrays(vectors, x64, *names):
  return (jnp.asarray(vectors[name], jnp.float64 if x64 else jnp.float32) for name in names)


def value_and_pullback(function, upstream, *args):
  @jax.jit
  def both(upstream, *args):
    out, pullback = jax.vjp(function, *args)
    return out, pullback(upstream)

  return both(upstream, *args)


@golden('quantisers', 'lsq')
@PRECISIONS
def test_lsq_and_its_gradients_agree_with_reference(vectors, x64):
  rtol = 1e-9 if x64 else 1e-5
  with jax.enable_x64(x64):
    for kind, signed, axis in (('weight', True, 0), ('act', False, None)):
      x, upstream = arrays(vectors, x64, f'in_{kind}', f'in_upstream_{kind}')
      for bits in vectors.param('bits'):
        low, high = affine.code_range(bits, signed)
        assert (low, high) == (
          vectors[f'param_qn_{kind}_b{bits}'],
          vectors[f'param_qp_{kind}_b{bits}'],
        )
        scale = learned.lsq_scale(x, high, axis)
        assert_close(scale.ravel(), vectors[f'out_init_scale_{kind}_b{bits}'], rtol)
        out, (grad_x, grad_scale) = value_and_pullback(
          lambda x, s, lo=low, hi=high: learned.lsq_fake_quantize(x, s, lo, hi), upstream, x, scale
        )
        assert_close(out, vectors[f'out_{kind}_b{bits}'], rtol)
        assert_close(grad_x, vectors[f'grad_{kind}_b{bits}'], rtol)
        expected = vectors[f'grad_scale_{kind}_b{bits}']
        assert_close(grad_scale.ravel(), expected, rtol, atol=0 if x64 else 1e-6)


@golden('quantisers', 'lsq')
def test_learnable_affine_agrees_with_pytorch_operators(vectors):
  for bits in vectors.param('bits'):
    x = jnp.asarray(vectors[f'in_affine_x_b{bits}'])
    scale = jnp.asarray(vectors[f'param_affine_scale_b{bits}'])
    zero_point = jnp.asarray(vectors[f'param_affine_zero_point_b{bits}'])
    factor = vectors.param(f'affine_grad_factor_b{bits}')
    low, high = affine.code_range(bits, signed=False)
    out, gradients = value_and_pullback(
      lambda x, s, z, f=factor, lo=low, hi=high: learned.lsq_plus_fake_quantize(
        x, s, z, lo, hi, grad_factor=f
      ),
      jnp.asarray(vectors['in_upstream_act'], jnp.float32),
      x,
      scale,
      zero_point,
    )
    assert_close(out, vectors[f'out_affine_b{bits}'])
    for name, gradient in zip(('x', 'scale', 'zero_point'), gradients, strict=True):
      assert_close(gradient, vectors[f'grad_affine_{name}_b{bits}'], atol=1e-6)


@golden('quantisers', 'pact_dorefa')
@PRECISIONS
def test_pact_and_dorefa_agree_with_ssql_toolbox(vectors, x64):
  rtol = 1e-9 if x64 else 1e-5
  with jax.enable_x64(x64):
    names = ('in_x', 'in_upstream', 'in_weight', 'in_upstream_weight', 'param_pact_alpha')
    x, upstream, weight, upstream_weight, alpha = arrays(vectors, x64, *names)
    for bits in vectors.param('bits'):
      out, (grad_x, grad_alpha) = value_and_pullback(
        lambda x, a, b=bits: learned.pact_fake_quantize(x, a, b), upstream, x, alpha
      )
      assert_close(out, vectors[f'out_pact_b{bits}'], rtol)
      assert_close(grad_x, vectors[f'grad_pact_x_b{bits}'], rtol)
      assert_close(grad_alpha, vectors[f'grad_pact_alpha_b{bits}'], rtol)
      for name, function, arg, up in (
        ('mean_weight', lambda w, b: learned.dorefa_mean_weights(w, b, 0), weight, upstream_weight),
        ('act', learned.dorefa_scaled_activations, x, upstream),
      ):
        out, gradients = value_and_pullback(lambda v, f=function, b=bits: f(v, b), up, arg)
        assert_close(out, vectors[f'out_dorefa_{name}_b{bits}'], rtol)
        assert_close(gradients[0], vectors[f'grad_dorefa_{name}_b{bits}'], rtol)
      standard = learned.dorefa_weights(weight, bits)
      assert_close(standard, vectors[f'out_dorefa_std_weight_b{bits}'], rtol)


X = jax.random.normal(jax.random.key(0), (6, 5))


def test_lsq_mask_is_on_the_unrounded_value():
  x = jnp.array([-2.3, -2.0, 1.0, 1.3])
  _, pullback = jax.vjp(lambda x: learned.lsq_fake_quantize(x, 1.0, -2.0, 1.0), x)
  np.testing.assert_array_equal(pullback(jnp.ones(4))[0], [0, 1, 1, 0])
  rounded = jax.grad(lambda x: affine.affine_fake_quantize(x, 1.0, 0.0, -2.0, 1.0).sum())(x)
  np.testing.assert_array_equal(rounded, [1, 1, 1, 1])


def test_steps_of_channels_share_the_factor_of_the_whole_tensor():
  low, high = affine.code_range(3, signed=True)
  scale = learned.lsq_scale(X, high, axis=-1)

  def total(scale, **kwargs):
    return (learned.lsq_fake_quantize(X, scale, low, high, **kwargs) * X).sum()

  plain = jax.jit(jax.grad(lambda s: total(s, grad_factor=1.0)))(scale)
  np.testing.assert_allclose(
    jax.jit(jax.grad(total))(scale), plain / np.sqrt(X.size * 3.0), rtol=1e-5, atol=1e-7
  )
  one = jax.grad(lambda s: (learned.lsq_fake_quantize(X[:, 0], s, low, high) * X[:, 0]).sum())
  factor = np.sqrt(X.shape[0] / X.size)
  np.testing.assert_allclose(
    jax.jit(jax.grad(total))(scale)[0, 0], one(scale[0, 0]) * factor, rtol=1e-4
  )


def test_a_step_below_the_floor_counts_as_the_floor():
  def fake(scale):
    return learned.lsq_fake_quantize(X, scale, -4.0, 3.0, floor=0.1)

  np.testing.assert_array_equal(fake(jnp.float32(-1)), fake(jnp.float32(0.1)))
  assert jax.grad(lambda s: (fake(s) * X).sum())(jnp.float32(0.01)) == 0
  assert jax.grad(lambda s: (fake(s) * X).sum())(jnp.float32(0.3)) != 0


MATRICES = hnp.arrays(
  np.float32, (4, 3), elements=st.floats(-100, 100, width=32, allow_subnormal=False)
)


@settings(max_examples=15, deadline=None)
@given(x=MATRICES, bits=st.integers(2, 8))
def test_outputs_are_fixed_points_on_few_levels(x, bits):
  low, high = affine.code_range(bits, signed=True)
  scale = jnp.float32(0.25)
  for fake in (
    lambda x: learned.lsq_fake_quantize(x, scale, low, high),
    lambda x: learned.lsq_plus_fake_quantize(x, scale, 2.4, 0.0, high - low),
    lambda x: learned.pact_fake_quantize(x, 4.0, bits),
    lambda x: learned.pact_fake_quantize(x, 4.0, bits, signed=True),
    lambda x: learned.dorefa_activations(x, bits),
  ):
    out = fake(jnp.asarray(x))
    np.testing.assert_allclose(fake(out), out, rtol=1e-5)
    assert len(np.unique(out)) <= 2**bits
  assert np.all(np.abs(learned.dorefa_weights(jnp.asarray(x), bits)) <= 1 + 1e-6)


def test_lsq_codes_and_affine_codes_agree():
  quantizer = affine.AffineQuantizer(4, 'symmetric')
  low, high = affine.code_range(4, signed=True)
  scale = learned.lsq_scale(X, high)
  params = affine.AffineParams(scale, jnp.zeros_like(scale), low, high)
  expected = affine.dequantize(quantizer, affine.quantize(quantizer, X, params), params)
  np.testing.assert_array_equal(learned.lsq_fake_quantize(X, scale, low, high), expected)


def test_pact_signed_gradients_and_the_wide_quirk():
  x = jnp.array([-3.0, -1.0, 0.4, 2.0, 5.0])
  out, pullback = jax.vjp(
    lambda x, a: learned.pact_fake_quantize(x, a, 2, signed=True), x, jnp.float32(2)
  )
  np.testing.assert_array_equal(out, [-2, 0, 0, 2, 2])
  grad_x, grad_alpha = pullback(jnp.array([1.0, 2.0, 4.0, 8.0, 16.0]))
  np.testing.assert_array_equal(grad_x, [0, 2, 4, 8, 0])
  assert grad_alpha == 8 + 16 - 1
  grid = jnp.linspace(-3, 3, 601)
  for wide, levels in ((False, 7), (True, 15)):
    wide_out = learned.pact_fake_quantize(grid, 2.0, 3, signed=True, wide=wide)
    assert len(np.unique(wide_out)) == levels


def test_pact_penalty_is_the_weighted_sum_of_squares():
  alphas = {'a': jnp.array([1.0, 2.0]), 'b': jnp.float32(3)}
  np.testing.assert_allclose(learned.pact_penalty(alphas), 14e-4, rtol=1e-6)
  gradient = jax.grad(learned.pact_penalty)(alphas)
  np.testing.assert_allclose(gradient['b'], 6e-4, rtol=1e-6)


@pytest.mark.exhaustive
def test_zeros_stay_zeros_with_finite_gradients():
  zeros = jnp.zeros((4, 3))
  for function in (learned.dorefa_weights, learned.dorefa_mean_weights):
    np.testing.assert_array_equal(function(zeros, 3), zeros)
    assert np.all(np.isfinite(jax.grad(lambda w, f=function: f(w, 3).sum())(zeros)))


FUNCTIONS = {
  'lsq': lambda x, bits: learned.lsq_fake_quantize(
    x, jnp.float32(0.2), *affine.code_range(bits, signed=True)
  ),
  'lsq_plus': lambda x, bits: learned.lsq_plus_fake_quantize(
    x, jnp.float32(0.2), jnp.float32(2.3), *affine.code_range(bits, signed=False)
  ),
  'pact': lambda x, bits: learned.pact_fake_quantize(x, jnp.float32(1.5), bits),
  'dorefa_weights': learned.dorefa_weights,
  'dorefa_activations': learned.dorefa_activations,
  'dorefa_mean_weights': learned.dorefa_mean_weights,
  'dorefa_scaled_activations': learned.dorefa_scaled_activations,
}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_traced_bits_and_bfloat16(name):
  function = FUNCTIONS[name]

  @jax.jit
  @jax.value_and_grad
  def compiled(x, bits):
    return (function(x, bits) * X).sum()

  with compilations.counted() as count:
    for bits in (2, 5):
      value, gradient = compiled(X, bits)
      np.testing.assert_allclose(value, (function(X, bits) * X).sum(), rtol=1e-5)
      assert np.all(np.isfinite(gradient)) and np.any(gradient != 0)
  assert count['compiled'] == 1
  coarse = X.astype(jnp.bfloat16)
  out = function(coarse, 3)
  assert out.dtype == jnp.bfloat16
  expected = function(coarse.astype(jnp.float32), 3).astype(jnp.bfloat16)
  np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: learned.lsq_scale(jnp.ones((2, 2)).at[:, 1].set(0), 3, axis=1), r'channels \[1\]'),
    (lambda: learned.lsq_scale(jnp.array([1.0, jnp.inf]), 3), 'not finite'),
    (lambda: learned.lsq_scale(X, 3, axis=2), 'axis=2 is not an axis'),
    (lambda: learned.lsq_fake_quantize(X, 1.0, -1, 0), '2 signed bits or more'),
    (lambda: learned.pact_fake_quantize(X, 1.0, 0), r'\[1, 16\]; got 0'),
    (lambda: learned.pact_fake_quantize(X, 1.0, 1, signed=True), r'\[2, 16\]; got 1'),
    (lambda: learned.pact_fake_quantize(X, 1.0, 4, wide=True), 'signed=True'),
    (lambda: learned.dorefa_weights(X, 1), r'\[2, 16\]; got 1'),
    (lambda: learned.dorefa_mean_weights(X, 17), 'got 17'),
  ],
)
def test_bad_input_is_named(make, match):
  with pytest.raises(ValueError, match=match):
    make()
