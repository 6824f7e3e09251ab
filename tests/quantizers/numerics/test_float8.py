import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import golden
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.parallel import make_mesh
from jaxlab.quantizers import (
  DelayedScale,
  Float8Scales,
  cast_saturating,
  float8_dot,
  float8_fake_quantize,
  float8_round,
  init_delayed_scale,
  update_delayed_scale,
)

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
NAMES = {'e4m3': E4M3, 'e5m2': E5M2}


@golden('tweo', 'fp8_cast')
def test_casts_and_scaled_rounding_agree_bit_for_bit_with_pytorch(vectors):
  x = vectors['in_x']
  for name, dtype in NAMES.items():
    got = jax.jit(lambda x, d=dtype: cast_saturating(x, d).astype(jnp.float32))(x)
    np.testing.assert_array_equal(got, vectors[f'out_saturating_cast_{name}'])
    assert not np.any(np.signbit(got) != np.signbit(vectors[f'out_saturating_cast_{name}']))
    data = x[14:]
    state = update_delayed_scale(init_delayed_scale(), jnp.max(jnp.abs(data)), dtype)
    assert state.history[0] == vectors[f'param_amax_{name}']
    np.testing.assert_array_equal(state.scale, vectors[f'param_scale_{name}'])
    quantize = functools.partial(float8_fake_quantize, dtype=dtype)
    for run in (quantize, jax.jit(quantize)):
      got = run(data, vectors[f'param_scale_{name}'])
      np.testing.assert_array_equal(got, vectors[f'out_scaled_qdq_{name}'])


@pytest.mark.parametrize('name', NAMES)
def test_casts_round_once(name):
  """Ties, and the nearest neighbors of ties: next to these a cast by way of float16 rounds twice."""
  dtype = NAMES[name]
  grid = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
  grid = np.unique(grid[np.isfinite(grid)])
  ties = np.float32((grid[1:] + grid[:-1]) / 2)
  ends = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
  x = np.concatenate([ties, *ends, np.random.default_rng(0).normal(size=1000)], dtype=np.float32)
  expected = x.astype(dtype).astype(np.float32)  # of ml_dtypes
  for run in (cast_saturating, jax.jit(cast_saturating, static_argnums=1)):
    np.testing.assert_array_equal(run(x, dtype).astype(jnp.float32), expected)
  slope = jax.grad(lambda x: cast_saturating(x, dtype).astype(jnp.float32))
  assert slope(jnp.float32(0.3)) == 1


def test_half_precisions_and_what_is_not_finite():
  for dtype, top in ((E4M3, 448), (E5M2, 57344)):
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 1e30])
    got = cast_saturating(x, dtype).astype(jnp.float32)
    np.testing.assert_array_equal(got, [top, -top, np.nan, top])
    half = float8_fake_quantize(jnp.array([300.0, 3.3], jnp.bfloat16), 1.0, dtype)
    assert half.dtype == jnp.bfloat16 and np.all(np.isfinite(half.astype(jnp.float32)))


def test_scales_look_at_the_last_maxima_and_are_those_of_earlier_steps():
  state, seen = init_delayed_scale(4), [3.0, 7.0, 1.0, 2.0, 0.5, 0.25, 0.125]
  assert state.scale == 1
  for step, amax in enumerate(seen):
    state = jax.jit(lambda s, a: update_delayed_scale(s, a, E4M3))(state, amax)
    largest = max(seen[max(0, step - 3) : step + 1])
    np.testing.assert_array_equal(state.scale, np.float32(448) / np.float32(largest))
  np.testing.assert_array_equal(state.history, [0.125, 0.25, 0.5, 2.0])
  reserve = update_delayed_scale(init_delayed_scale(), 2.0, E5M2, margin=1)
  assert reserve.scale == 57344 / 2 / 2


@pytest.mark.parametrize('amax', [jnp.nan, jnp.inf, -jnp.inf])
def test_a_maximum_that_is_not_finite_changes_nothing(amax):
  state = update_delayed_scale(init_delayed_scale(), 3.0, E4M3)
  jax.tree.map(np.testing.assert_array_equal, update_delayed_scale(state, amax, E4M3), state)


@pytest.mark.parametrize('amax', [0.0, 1e-44])
def test_a_scale_never_becomes_zero_or_infinite(amax):
  """Zeros alone, and a maximum whose quotient overflows, leave the scale as it is."""
  state = DelayedScale(jnp.zeros(2), jnp.float32(5))
  assert update_delayed_scale(state, amax, E4M3).scale == 5
  assert 0 < update_delayed_scale(state, jnp.float32(3e38), E4M3).scale < 1e-30


def operands(seed=0, batch=(3, 5), size=(8, 6)):
  rng = np.random.default_rng(seed)
  x, kernel = rng.standard_normal((*batch, size[0])), rng.standard_normal(size)
  g = 1e-4 * rng.standard_normal((*batch, size[1]))
  tops = (448, 448, 57344)
  scales = [t / np.abs(a).max() for t, a in zip(tops, (x, kernel, g))]
  return *(jnp.asarray(a, jnp.float32) for a in (x, kernel, g)), Float8Scales(
    *map(jnp.float32, scales)
  )


def rounded(x, scale, dtype):
  """By ml_dtypes on the host, in float64 behind the cast."""
  top = float(jnp.finfo(dtype).max)
  codes = np.clip(np.asarray(x, np.float32) * np.float32(scale), -top, top).astype(dtype)
  return codes.astype(np.float64) / np.float64(np.float32(scale))


def test_the_product_and_both_gradients_are_those_of_rounded_operands():
  x, kernel, g, scales = operands()

  @jax.jit
  def both(x, kernel, probe, g):
    y, pull_back = jax.vjp(lambda *args: float8_dot(*args[:2], scales, args[2]), x, kernel, probe)
    return y, *pull_back(g)

  y, dx, dw, amax = both(x, kernel, jnp.float32(0), g)
  x8, w8, g8 = (
    rounded(a, s, d) for a, s, d in zip((x, kernel, g), scales, (E4M3, E4M3, E5M2), strict=True)
  )
  np.testing.assert_allclose(y, x8 @ w8, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dx, g8 @ w8.T, rtol=1e-5, atol=1e-9)
  np.testing.assert_allclose(dw, np.einsum('bti,bto->io', x8, g8), rtol=1e-5, atol=1e-9)
  assert amax == np.abs(g).max()
  assert np.any(np.abs(y - x @ kernel) > 1e-4)


def test_the_operands_of_all_three_products_are_eight_bits_wide():
  x, kernel, g, scales = operands()

  def run(x, kernel, g):
    return jax.vjp(lambda *args: float8_dot(*args, scales, jnp.float32(0)), x, kernel)[1](g)

  text = jax.jit(run).lower(x, kernel, g).as_text()
  dots = [line for line in text.splitlines() if 'dot_general' in line]
  assert len(dots) == 2 and all('f8E5M2' in line and 'f8E4M3FN' in line for line in dots)
  forward = (
    jax.jit(lambda x, w: float8_dot(x, w, scales, jnp.float32(0))).lower(x, kernel).as_text()
  )
  (dot,) = [line for line in forward.splitlines() if 'dot_general' in line]
  assert dot.count('f8E4M3FN') == 2 and 'xf32>' in dot


def test_values_beyond_the_scale_saturate_and_keep_their_gradient():
  x, kernel = jnp.full((2, 4), 100.0), jnp.ones((4, 3))
  scales = Float8Scales(jnp.float32(44.8), jnp.float32(1), jnp.float32(1))  # up to 10
  y, pull_back = jax.vjp(lambda x: float8_dot(x, kernel, scales, jnp.float32(0)), x)
  np.testing.assert_allclose(y, 40, rtol=1e-5)
  np.testing.assert_allclose(pull_back(jnp.ones((2, 3)))[0], 3, rtol=1e-5)


@pytest.mark.exhaustive
def test_rounding_of_a_norm_quantizes_both_ways():
  x, _, _, scales = operands(size=(8, 8))
  g = 1e-4 * jax.random.normal(jax.random.key(1), x.shape)
  y, pull_back = jax.vjp(
    lambda x, p: float8_round(x, scales.x, scales.gradient, p), x, jnp.float32(0)
  )
  np.testing.assert_array_equal(y, float8_fake_quantize(x, scales.x, E4M3))
  dx, amax = pull_back(g)
  np.testing.assert_array_equal(dx, float8_fake_quantize(g, scales.gradient, E5M2))
  assert amax == jnp.abs(g).max()


@pytest.mark.exhaustive
def test_transformations_agree():
  x, kernel, _, scales = operands(batch=(8,))

  def loss(x, kernel, probe):
    return jnp.sum(float8_dot(x, kernel, scales, probe) ** 2)

  grad = jax.grad(loss, (0, 1, 2))
  expected = grad(x, kernel, jnp.float32(0))
  split = jax.device_put(x, NamedSharding(make_mesh(), PartitionSpec('data')))
  for given in (x, split):
    for got, wanted in zip(jax.jit(grad)(given, kernel, jnp.float32(0)), expected, strict=True):
      np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
  remat = jax.grad(jax.checkpoint(loss), (0, 1, 2))(x, kernel, jnp.float32(0))
  for got, wanted in zip(remat, expected, strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
  mapped = jax.vmap(lambda x: float8_dot(x, kernel, scales, jnp.float32(0)))(x)
  np.testing.assert_allclose(mapped, float8_dot(x, kernel, scales, jnp.float32(0)), rtol=1e-5)
  half = [a.astype(jnp.bfloat16) for a in (x, kernel)]
  dx, dw, amax = grad(*half, jnp.bfloat16(0))
  assert (dx.dtype, dw.dtype, amax.dtype) == (jnp.bfloat16,) * 3


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda x: cast_saturating(x, jnp.float16),
      'must be float8_e4m3fn or float8_e5m2, got float16',
    ),
    (lambda x: cast_saturating(x.astype(int), E4M3), 'x must be floating, got int32'),
    (lambda x: float8_fake_quantize(x, 0.0, E4M3), 'must be positive and finite, got 0.0'),
    (lambda x: float8_fake_quantize(x, jnp.inf, E4M3), 'must be positive and finite, got inf'),
    (
      lambda x: float8_dot(x, x, Float8Scales(1.0, jnp.nan, 1.0), 0.0),
      'positive and finite, got nan',
    ),
    (
      lambda x: float8_dot(x, jnp.ones((3, 2)), Float8Scales(1.0, 1.0, 1.0), 0.0),
      r'\(4, 4\) and \(3, 2\)',
    ),
    (lambda x: init_delayed_scale(0), 'length must be positive'),
    (
      lambda x: update_delayed_scale(init_delayed_scale(), 1.0, jnp.float32),
      'must be float8_e4m3fn',
    ),
  ],
)
def test_bad_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(jnp.ones((4, 4)))
