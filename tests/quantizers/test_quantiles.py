import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlab.quantizers.quantiles import select_quantiles


@hypothesis.given(
  hnp.arrays(
    np.float32, (3, 7), elements=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
  ),
  st.lists(st.floats(0, 1), min_size=2, max_size=2),
  st.sampled_from([None, (0,), (1,), (0, 1), (-1,)]),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_equals_the_quantiles_of_the_sorted_values(x, shares, axes):
  found = select_quantiles(x, shares, axes)
  expected = np.quantile(x.astype(np.float64), shares, axes, keepdims=True)
  assert found.shape == expected.shape
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(x).max())


@pytest.mark.parametrize('value', [0.0, -0.0, -3.0, np.inf, -np.inf, 1e-45, 3.4e38])
def test_a_constant_is_its_own_quantile(value):
  x = jnp.full((5, 2), value, jnp.float32)
  assert np.array_equal(select_quantiles(x, [0, 0.4, 1]), np.full((3, 1, 1), np.float32(value)))


def test_ends_are_the_extremes_also_where_they_are_infinite():
  x = jnp.asarray([1.0, -jnp.inf, 2.0, jnp.inf])
  np.testing.assert_array_equal(select_quantiles(x, [0, 1]).ravel(), [-np.inf, np.inf])


def test_one_nan_makes_its_own_quantiles_nan_and_no_others():
  x = jnp.asarray([[1.0, jnp.nan], [2.0, 3.0], [5.0, 4.0]])
  found = select_quantiles(x, [0.0, 0.5], (0,))
  np.testing.assert_array_equal(found[:, 0, 0], [1.0, 2.0])
  assert np.all(np.isnan(found[:, 0, 1]))


def test_double_precision_is_selected_in_double_precision():
  with jax.enable_x64(True):
    x = jnp.asarray(np.random.default_rng(0).normal(size=101))
    np.testing.assert_allclose(
      select_quantiles(x, [0.01, 0.999]).ravel(), np.quantile(x, [0.01, 0.999]), rtol=1e-14
    )


def test_values_split_over_devices_give_the_same_bits():
  x = np.random.default_rng(0).normal(size=(16, 33)).astype(np.float32)
  mesh = Mesh(np.array(jax.devices()), ('data',))
  split = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data')))
  shares = (0.001, 0.9999)
  select = jax.jit(lambda x: select_quantiles(x, shares))
  assert np.array_equal(select(split), select(x))
  hlo = select.lower(split).compile().as_text()
  assert 'all-gather' not in hlo and 'all-reduce' in hlo


@pytest.mark.parametrize(
  ('x', 'shares', 'message'),
  [
    (jnp.ones(3, jnp.int32), [0.5], 'float32 or float64, got int32'),
    (jnp.ones(3), [1.5], 'must lie in'),
    (jnp.ones(3), [], 'at least one'),
    (jnp.ones((0, 2)), [0.5], 'no values'),
  ],
)
def test_bad_input_is_named(x, shares, message):
  with pytest.raises(ValueError, match=message):
    select_quantiles(x, shares)
