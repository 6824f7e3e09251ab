import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import data

CLOUD = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3)), jnp.float32)


def test_dropped_points_lie_where_the_first_one_does():
  keys = jax.random.split(jax.random.key(0), 200)
  clouds = jax.jit(jax.vmap(lambda key: data.random_point_dropout(key, CLOUD)))(keys)
  kept = np.all(clouds == CLOUD, -1)
  assert np.all(kept | np.all(clouds == CLOUD[0], -1))
  share = 1 - kept.mean(1)
  assert share.max() < 0.99 and abs(share.mean() - 0.4375) < 0.05
  np.testing.assert_array_equal(data.random_point_dropout(keys[0], CLOUD, 0.0), CLOUD)


def test_clouds_are_scaled_and_moved():
  keys = jax.random.split(jax.random.key(0), 200)
  clouds = jax.vmap(lambda key: data.random_scale_shift(key, CLOUD, (0.5, 2.0), 0.3))(keys)
  spread = (clouds - clouds.mean(1, keepdims=True)) / (CLOUD - CLOUD.mean(0))
  factor = spread.mean((1, 2))
  np.testing.assert_allclose(
    spread, np.broadcast_to(factor[:, None, None], spread.shape), rtol=1e-2
  )
  assert 0.5 <= factor.min() < 0.6 and 1.9 < factor.max() <= 2.0
  moved = np.mean(clouds - factor[:, None, None] * CLOUD, 1)
  assert 0.25 < np.abs(moved).max() <= 0.301


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda key: data.random_point_dropout(key, CLOUD, 1.5), 'max_share is 1.5'),
    (lambda key: data.random_scale_shift(key, CLOUD, (0.0, 1.0)), 'scale='),
    (lambda key: data.random_scale_shift(key, CLOUD, (1.0, 1.0), -1), 'shift=-1'),
  ],
)
def test_impossible_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(jax.random.key(0))
