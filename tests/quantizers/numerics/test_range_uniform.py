import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.parallel import make_mesh
from jaxlab.quantizers import (
  activation_range,
  feature_scale,
  output_scale,
  quantize_feature,
  range_quantize,
  weight_range,
)


def conv(x, kernel, stride, padding):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    [(padding, padding)] * 2,
    dimension_numbers=('NCHW', 'OIHW', 'NCHW'),
    precision=jax.lax.Precision.HIGHEST,
  )


@golden('qfd', 'range_quantizer_conv')
@pytest.mark.parametrize('x64', [True, False])
def test_a_quantized_convolution_and_its_gradients_agree_with_reference(vectors, x64):
  hyper = {
    name: vectors[f'hp_{name}'].item() for name in ('weight_bits', 'act_bits', 'stride', 'padding')
  }
  delta = vectors['hp_ewgs_delta'].item()
  rtol = (1e-8 if delta else 1e-10) if x64 else 1e-5
  run = functools.partial(conv, stride=hyper['stride'], padding=hyper['padding'])
  names = ('x_nchw', 'weight_oihw', 'uW', 'lW', 'uA', 'lA', 'output_scale')

  def operands(x, weight, upper_w, lower_w, upper_a, lower_a):
    new = range_quantize(weight, lower_w, upper_w, hyper['weight_bits'], signed=True, delta=delta)
    return range_quantize(x, lower_a, upper_a, hyper['act_bits'], signed=False, delta=delta), new

  def layer(*args):
    return jnp.abs(args[-1]) * run(*operands(*args[:-1]))

  with jax.enable_x64(x64):
    given = [
      jnp.asarray(vectors[f'in_{name}' if name[0] in 'xw' else f'param_{name}'], float)
      for name in names
    ]
    activations, weights = jax.jit(operands)(*given[:-1])
    assert_close(weights, vectors['out_weight_q'], rtol)
    assert_close(activations, vectors['out_act_q'], rtol)

    @jax.jit
    def both(cotangent, *args):
      y, pull_back = jax.vjp(layer, *args)
      return y, pull_back(cotangent)

    y, grads = both(jnp.asarray(vectors['grad_cotangent'], float), *given)
    assert_close(y, vectors['out'], rtol)
    for name, grad in zip(names, grads, strict=True):
      loose = name == 'output_scale' and not x64
      assert_close(grad, vectors[f'grad_{name}'], 1e-4 if loose else rtol)


@golden('qfd', 'range_quantizer_conv')
@pytest.mark.parametrize('x64', [True, False])
def test_first_ranges_and_scale_agree_with_reference(vectors, x64):
  rtol = 1e-9 if x64 else 1e-5
  with jax.enable_x64(x64):
    x, weight = (jnp.asarray(vectors[f'in_{name}'], float) for name in ('x_nchw', 'weight_oihw'))
    of_weight, of_x = weight_range(weight), activation_range(x)
    assert_close(of_weight.upper, vectors['init_uW'], rtol)
    assert_close(of_weight.lower, vectors['init_lW'], rtol)
    assert_close(of_x.upper, vectors['init_uA'], rtol)
    assert_close(of_x.lower, vectors['init_lA'], rtol)
    new_x = range_quantize(x, *of_x, vectors['hp_act_bits'].item(), signed=False)
    new = range_quantize(weight, *of_weight, vectors['hp_weight_bits'].item(), signed=True)
    stride, padding = vectors['hp_stride'].item(), vectors['hp_padding'].item()
    scale = output_scale(*(conv(*pair, stride, padding) for pair in ((x, weight), (new_x, new))))
    assert_close(scale, vectors['init_output_scale'], rtol)


def test_both_ends_of_the_range_pass_their_gradient():
  x = jnp.array([0.0, 0.5, 1.0])
  grads = jax.grad(lambda *args: range_quantize(*args, 2, signed=False).sum(), (0, 1, 2))(
    x, 0.0, 1.0
  )
  np.testing.assert_array_equal(grads[0], [1, 1, 1])
  np.testing.assert_allclose(grads[1:], [-1.5, -1.5])
  outside = jax.grad(lambda *args: range_quantize(*args, 2, signed=False).sum(), (0, 1, 2))(
    jnp.array([-0.1, 1.1]), 0.0, 1.0
  )
  assert not any(np.any(g) for g in outside)


@pytest.mark.parametrize('bits', [1, 2, 4])
def test_levels_are_evenly_spaced_over_the_range(bits):
  x = jnp.linspace(-3, 3, 1001)
  levels = 2**bits
  unsigned = range_quantize(x, -1.0, 2.0, bits, signed=False)
  np.testing.assert_allclose(np.unique(unsigned), np.linspace(0, 1, levels), atol=1e-6)
  signed = range_quantize(x, -1.0, 2.0, bits, signed=True)
  np.testing.assert_allclose(signed, 2 * unsigned - 1, atol=1e-6)
  feature = quantize_feature(x, -1.0, 2.0, bits)
  np.testing.assert_allclose(np.unique(feature), np.linspace(-1, 2, levels), rtol=1e-5)
  inside = (x >= -1) & (x <= 2)
  assert np.abs(feature - x)[inside].max() <= 1.5 / (levels - 1) + 1e-5
  traced = jax.jit(lambda b: range_quantize(x, -1.0, 2.0, b, signed=False))(jnp.float32(bits))
  np.testing.assert_allclose(traced, unsigned, rtol=1e-6)
  for flag in (False, True):
    traced = jax.jit(lambda s: range_quantize(x, -1.0, 2.0, bits, signed=s))(flag)
    np.testing.assert_allclose(traced, signed if flag else unsigned, atol=1e-6)


def test_one_bit_is_a_threshold_in_the_middle_that_goes_down():
  x = jnp.array([0.49, 0.5, 0.51])
  np.testing.assert_array_equal(range_quantize(x, 0.0, 1.0, 1, signed=True), [-1, -1, 1])
  np.testing.assert_array_equal(quantize_feature(x, 0.0, 1.0, 1), [0, 0, 1])


@pytest.mark.exhaustive
def test_scaled_features_stay_in_units_of_the_range_and_keep_their_mean():
  x = jnp.abs(jax.random.normal(jax.random.key(0), (64, 8)))
  ends = activation_range(x)
  beta = feature_scale(x, *ends, 2)
  y = quantize_feature(x, *ends, 2, units='scaled', beta=beta)
  clipped = np.clip((x - ends.lower) / (ends.upper - ends.lower), 0, 1)
  np.testing.assert_allclose(jnp.mean(y), clipped.mean(), rtol=1e-5)
  np.testing.assert_allclose(y / beta, range_quantize(x, *ends, 2, signed=False), rtol=1e-5)
  grad = jax.grad(lambda b: quantize_feature(x, *ends, 2, units='scaled', beta=b).sum())(beta)
  np.testing.assert_allclose(grad, range_quantize(x, *ends, 2, signed=False).sum(), rtol=1e-5)
  assert feature_scale(jnp.zeros(4), 1.0, 2.0, 2) == 1


def test_feature_gradients_are_those_of_the_formula():
  """d(l + (u - l) q): x passes inside; outside an end gets everything."""
  x = jnp.array([-1.0, 0.3, 5.0])
  grads = jax.grad(lambda *args: quantize_feature(*args, 1).sum(), (0, 1, 2))(x, 0.0, 2.0)
  np.testing.assert_array_equal(grads[0], [0, 1, 0])
  # q = 0, 0, 1 and z = 0.15 within: dl = (1 - q) + (u - l) (z - 1) / (u - l), du = q - z.
  np.testing.assert_allclose(grads[1], 1 + (1 - 0 + 0.15 - 1) + 0, rtol=1e-5)
  np.testing.assert_allclose(grads[2], 0 + (0 - 0.15) + 1, rtol=1e-5)


def test_crossed_ends_give_finite_values_and_gradients():
  x = jnp.linspace(-1, 1, 9)
  for lower, upper in ((0.5, -0.5), (0.25, 0.25)):
    value, grads = jax.value_and_grad(
      lambda *args: range_quantize(*args, 2, signed=True).sum(), (0, 1, 2)
    )(x, lower, upper)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in grads)


def test_crossed_ends_are_a_threshold_at_the_lower_one():
  """A width of -1 counts as 1e-6: codes 0 up to `lower`, and the largest one above."""
  x = jnp.array([0.4, 0.5, 0.6])
  np.testing.assert_array_equal(range_quantize(x, 0.5, -0.5, 2, signed=False), [0, 0, 1])


def test_first_ranges_of_awkward_values():
  signed = activation_range(jnp.array([-1.0, 2.0, 3.0]), signed=None)
  deviation = np.std([-1.0, 2.0, 3.0], ddof=1)
  np.testing.assert_allclose(signed, [-3 * deviation, 3 * deviation], rtol=1e-6)
  dead = activation_range(jnp.full(5, 2.0))
  np.testing.assert_allclose(dead, [2, 2.001], rtol=1e-6)
  below = activation_range(jnp.full(5, -0.5), signed=None)
  np.testing.assert_allclose(below, [-0.5, -0.499], rtol=1e-6)
  with pytest.raises(ValueError, match='does not open'):
    activation_range(jnp.array([100.0, 100.1]))
  with pytest.raises(ValueError, match='not finite'):
    activation_range(jnp.array([1.0, jnp.nan]))
  for weight in (jnp.zeros((3, 3)), jnp.full((3, 3), jnp.inf)):
    with pytest.raises(ValueError, match='have no range'):
      weight_range(weight)
  assert output_scale(jnp.ones(3), jnp.zeros(3)) == 1


@pytest.mark.exhaustive
def test_transformations_agree():
  x = jax.random.normal(jax.random.key(0), (8, 6))
  quantize = functools.partial(
    range_quantize, lower=-1.0, upper=1.5, bits=3, signed=True, delta=0.1
  )
  grad = jax.grad(lambda x: (quantize(x) * x).sum())
  np.testing.assert_array_equal(jax.vmap(quantize)(x), quantize(x))
  np.testing.assert_allclose(jax.jit(jax.vmap(grad))(x), grad(x), rtol=1e-6)
  half = quantize(x.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    half.astype(jnp.float32), quantize(x.astype(jnp.bfloat16).astype(jnp.float32)), rtol=1e-2
  )
  split = jax.device_put(x, NamedSharding(make_mesh(), PartitionSpec('data')))
  for got, expected in zip(jax.jit(activation_range)(split), activation_range(x), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-5)
  ends_grad = jax.grad(lambda u: (range_quantize(x, -1.0, u, 3, signed=True) * x).sum())
  sharded = jax.jit(jax.grad(lambda u, x: (range_quantize(x, -1.0, u, 3, signed=True) * x).sum()))(
    1.5, split
  )
  np.testing.assert_allclose(sharded, ends_grad(1.5), rtol=1e-5)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda x: range_quantize(x, 0, 1, 0, signed=True), r'bits must lie in \[1, 16\]; got 0'),
    (lambda x: range_quantize(x, 0, 1, 2, signed=True, delta=-1.0), 'delta must not be negative'),
    (lambda x: quantize_feature(x, 0, 1, 2, units='float'), "units='float'"),
    (lambda x: quantize_feature(x, 0, 1, 2, units='scaled'), 'beta goes with'),
    (lambda x: quantize_feature(x, 0, 1, 2, beta=1.0), 'beta goes with'),
  ],
)
def test_bad_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(jnp.ones(3))
