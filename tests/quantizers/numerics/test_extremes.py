"""Minimum and maximum with the gradients of jax's own, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import quantizers
from jaxlab.quantizers.networks.operands import is_finite
from jaxlab.quantizers.numerics.extremes import extremes, largest_magnitude


def reference(x, axes):
  return jnp.min(x, axes, keepdims=True), jnp.max(x, axes, keepdims=True)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  'shape', [(3, 4, 5), (2**7, 2**8, 2)]
)  # below and above 2^15 values a bound
def test_values_and_gradients_are_those_of_jax_also_at_ties(shape, dtype):
  # Few different values: nearly every bound is reached more than once; one slice is constant.
  x = np.random.default_rng(0).integers(-2, 3, shape).astype(np.float32)
  x[..., 0] = 1
  x, axes = jnp.asarray(x, dtype), (0, 1)
  weights = tuple(jnp.asarray([2.0, -3.0], dtype))

  def total(of, x):
    return sum(
      w * jnp.sum(jnp.square(bound)) for w, bound in zip(weights, of(x, axes), strict=True)
    )

  for own, expected in zip(extremes(x, axes), reference(x, axes), strict=True):
    np.testing.assert_array_equal(own, expected)
  # jax's own counts ties in the dtype: a reference in float32.
  wide = x.astype(jnp.float32)
  own = jax.jit(jax.grad(lambda x: total(extremes, x)))(x)
  expected = jax.jit(jax.grad(lambda x: total(reference, x)))(wide)
  assert own.dtype == dtype
  tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
  np.testing.assert_allclose(np.float32(own), expected, rtol=tolerance)
  for own, expected in zip(
    *(
      jax.jvp(lambda x, of=of: of(x, axes), (wide,), (wide + 1,))[1] for of in (extremes, reference)
    ),
    strict=True,
  ):
    np.testing.assert_allclose(own, expected, rtol=1e-5)


@pytest.mark.parametrize('shape', [(64,), (65536,), (8, 32, 32, 3)])
@pytest.mark.parametrize('at', [9, -1])
def test_one_missing_number_among_many_is_seen(shape, at):
  x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  whole = x.copy()
  x.reshape(-1)[at] = np.nan
  axes = tuple(range(x.ndim))
  for call in (lambda f: f, jax.jit):
    assert not call(is_finite)(x) and call(is_finite)(whole)
    assert np.isnan(call(lambda x: extremes(x, axes))(x)).all()
    assert np.isnan(call(largest_magnitude)(x))
    np.testing.assert_array_equal(call(largest_magnitude)(whole), np.abs(whole).max())
  with pytest.raises(ValueError, match='not finite'):
    quantizers.calibrate(quantizers.AffineQuantizer(bits=4), x)
