import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.quantizers import AffineQuantizer
from jaxlab.quantizers.numerics import affine, storage

RULES = [
  AffineQuantizer(bits, rule, **granularity)
  for bits in (3, 4, 12)
  for rule, granularity in (
    ('symmetric', {'granularity': 'channel'}),
    ('asymmetric', {'granularity': 'group', 'axis': 0, 'group_size': 5}),
    ('asymmetric_clipped', {}),
  )
]
X = jax.random.normal(jax.random.key(0), (15, 4))


@settings(max_examples=12, deadline=None)
@given(rule=st.sampled_from(RULES), seed=st.integers(0, 9))
def test_stored_arrays_give_the_fake_quantized_values_back(rule, seed):
  x = X * (1 + seed)
  stored = storage.store(rule, x)
  expected = affine.fake_quantize(rule, x, affine.calibrate(rule, x))
  np.testing.assert_array_equal(stored.dequantize(), expected)
  np.testing.assert_array_equal(
    stored.integer_codes(), affine.quantize(rule, x, affine.calibrate(rule, x))
  )


def test_constant_channels_are_stored_and_scales_of_zero_refused():
  rule = AffineQuantizer(8, 'asymmetric', 'channel')
  for constant in (0, 2, -0.3):
    stored = storage.store(rule, X.at[:, 1].set(constant))
    np.testing.assert_allclose(stored.dequantize()[:, 1], constant, rtol=1e-6)
  x = X.at[:, 1].set(2)
  with pytest.raises(ValueError, match='range without extent'):
    storage.store(rule, x, affine.calibrate(rule, x, on_degenerate='identity'))


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: storage.store(RULES[0], jnp.float32(1)), 'scalar'),
    (
      lambda: storage.store(RULES[0], X, affine.calibrate(RULES[3], X)),
      'the quantizer has 3 bits',
    ),
    (lambda: storage.store(RULES[0], X.at[0, 0].set(jnp.nan)), 'not finite'),
  ],
)
def test_bad_input_is_named(make, match):
  with pytest.raises(ValueError, match=match):
    make()
