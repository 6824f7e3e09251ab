import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.quantizers.numerics import row_sums
from jaxlab.quantizers.numerics.row_sums import rows_of, whole


@pytest.mark.parametrize('one_cpu', [False, True])
@hypothesis.given(
  st.sampled_from([(7,), (40,), (3, 17), (33, 2), (5, 1, 9), (4, 3, 2, 11), (130, 70)]),
  st.data(),
  st.sampled_from([8, 64, 8192]),
)
@hypothesis.settings(
  max_examples=8,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_sums_and_minima_over_rows_are_those_of_the_whole(monkeypatch, one_cpu, shape, data, lanes):
  monkeypatch.setattr(row_sums, 'LANES', lanes)
  monkeypatch.setattr(row_sums, 'has_one_cpu', lambda: one_cpu)
  axes = data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1).map(sorted).map(tuple))
  x = np.random.default_rng(0).integers(-9, 9, shape).astype(np.float32)
  # 100 is what fills up the last row: no value is above it, and it counts for nothing below.
  for rows in (rows_of(jnp.asarray(x), axes, 100), whole(jnp.asarray(x), axes, 100)):
    visit = lambda row: jnp.stack([jnp.where(row < 100, row, 0), (row < 0) * 1.0])  # noqa: E731
    expected = [x.sum(axes, keepdims=True), (x < 0).sum(axes, keepdims=True)]
    np.testing.assert_array_equal(rows.total(visit).reshape(2, *rows.kept), expected)
    least = rows.least(lambda row: row[None], 100).reshape(rows.kept)
    np.testing.assert_array_equal(least, x.min(axes, keepdims=True))
