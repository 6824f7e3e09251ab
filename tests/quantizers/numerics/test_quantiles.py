import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlab.quantizers.numerics import quantiles, row_sums
from jaxlab.quantizers.numerics.quantiles import quantiles_by_ends, select_quantiles


@hypothesis.given(
  hnp.arrays(
    np.float32, (3, 7), elements=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
  ),
  st.lists(st.floats(0, 1), min_size=2, max_size=2),
  st.sampled_from([None, (0,), (1,), (0, 1), (-1,)]),
)
@hypothesis.settings(max_examples=20, deadline=None)
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


@pytest.mark.parametrize('shares', tables.first([[0.0, 0.1, 0.9, 1.0], [0.999], [0.01, 0.2]]))
def test_ends_of_rows_of_different_lengths_give_the_same_quantiles(shares):
  rng = np.random.default_rng(0)
  rows = [rng.normal(size=count).astype(np.float32) for count in (1, 2, 9, 40)]
  top, bottom = (
    jnp.asarray([np.pad(row, (0, 40 - len(row)), constant_values=value) for row in rows])
    for value in (-np.inf, np.inf)
  )
  found = quantiles_by_ends(top, bottom, np.asarray([len(row) for row in rows]), shares)
  for row, own in zip(rows, found.T, strict=True):
    np.testing.assert_allclose(own, select_quantiles(row, shares).ravel(), rtol=1e-6)


@pytest.mark.parametrize(
  ('shape', 'axes'), tables.cells([(8, 50, 7), (3, 1009), (64, 300)], [None, (0, 1), (1,)], 3)
)
def test_sorted_ends_and_both_ways_to_count_agree(monkeypatch, shape, axes):
  x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
  shares, axes = (0.001, 0.0004, 0.9993), axes or tuple(range(len(shape)))
  asked, found = [], [select_quantiles(x, shares, axes)]  # counted in rows that keep devices apart
  for name in ('sorted', 'counted'):
    for module in (quantiles, row_sums):
      monkeypatch.setattr(module, 'has_one_cpu', lambda name=name: asked.append(name) or True)
    if name == 'counted':
      monkeypatch.setattr(quantiles, 'FEW', -1)
      monkeypatch.setattr(quantiles, 'TAIL', -1)
    quantiles.quantiles_of_finite.clear_cache()
    found.append(select_quantiles(x, shares, axes))
  quantiles.quantiles_of_finite.clear_cache()
  assert 'sorted' in asked  # it was traced anew
  assert np.array_equal(found[0], found[1].reshape(found[0].shape))
  assert np.array_equal(found[0], found[2])
