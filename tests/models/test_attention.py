import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxlab.models.attention import attention_scores, softmax, weighted_values


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize('heads, kv_heads', [(4, 4), (6, 2)])
def test_products_are_those_of_each_query_head_with_its_key_head(heads, kv_heads):
  query, key, value = (
    draw(2, t, h, 5, seed=t) for t, h in ((3, heads), (7, kv_heads), (7, kv_heads))
  )
  weights = draw(2, heads, 3, 7)
  with jax.enable_x64(True):
    scores = attention_scores(jnp.asarray(query), jnp.asarray(key))
    y = weighted_values(jnp.asarray(weights), jnp.asarray(value))
  group = heads // kv_heads
  for head in range(heads):
    q, k, v = query[:, :, head], key[:, :, head // group], value[:, :, head // group]
    np.testing.assert_allclose(scores[:, head], q @ k.transpose(0, 2, 1) / np.sqrt(5), rtol=1e-12)
    np.testing.assert_allclose(
      y[:, :, 5 * head : 5 * head + 5], weights[:, head] @ v, rtol=1e-11, atol=1e-12
    )


def test_scores_of_half_precision_are_float32():
  query = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
  assert attention_scores(query, query).dtype == jnp.float32


def test_softmax_and_its_derivatives_of_both_modes_and_orders():
  with jax.enable_x64(True):
    scores = jnp.asarray(3 * draw(2, 3, 5))
    np.testing.assert_allclose(softmax(scores), jax.nn.softmax(scores), rtol=1e-12)
    check_grads(softmax, (scores,), order=2, modes=('fwd', 'rev'))


def test_softmax_survives_large_and_lowest_scores():
  lowest = jnp.finfo(jnp.float32).min
  scores = jnp.array([[1e30, 0, lowest], [5, 4 + lowest, lowest], [lowest] * 3])
  expected = [[1, 0, 0], [1, 0, 0], [1 / 3] * 3]
  np.testing.assert_allclose(softmax(scores), expected, rtol=1e-6)
  gradient = jax.grad(lambda s: jnp.sum(softmax(s)[:, 0]))(scores)
  np.testing.assert_array_equal(gradient[:2], 0)
  assert np.isfinite(gradient).all()
