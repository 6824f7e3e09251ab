"""The table of a language model: the function and parameters of Linen's, in either order of the product."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn

from jaxlab.models import embedding

SHAPES = [((2, 3), 4096), ((2, 5), 4096), ((1, 1), 4100), ((4, 9), 50), ((12,), 4096)]


@pytest.mark.parametrize('shape, entries', tables.some(SHAPES, 2), ids=str)
def test_scores_are_those_of_linen(shape, entries):
  x = jax.random.normal(jax.random.key(0), (*shape, 16))
  ours, linen = embedding.Embed(entries, 16), nn.Embed(entries, 16)
  variables = ours.init(jax.random.key(1), jnp.zeros(shape, jnp.int32))
  chex.assert_trees_all_equal(variables, linen.init(jax.random.key(1), jnp.zeros(shape, jnp.int32)))

  def loss(module, variables, x):
    scores = module.apply(variables, x, method='attend')
    return jnp.sum(jnp.sin(scores)), scores

  (_, scores), gradients = jax.jit(
    jax.value_and_grad(lambda v, x: loss(ours, v, x), (0, 1), has_aux=True)
  )(variables, x)
  (_, expected), reference = jax.value_and_grad(
    lambda v, x: loss(linen, v, x), (0, 1), has_aux=True
  )(variables, x)
  assert scores.shape == (*shape, entries)
  chex.assert_trees_all_close((scores, gradients), (expected, reference), rtol=1e-5, atol=2e-5)


def test_half_precision_and_vmap():
  module = embedding.Embed(5000, 8, dtype=jnp.bfloat16)
  tables = jax.random.normal(jax.random.key(0), (3, 5000, 8))
  x = jax.random.normal(jax.random.key(1), (3, 10, 8))

  def scores(table, x):
    return module.apply({'params': {'embedding': table}}, x, method='attend')

  found = jax.vmap(scores)(tables, x)
  assert found.dtype == jnp.bfloat16
  expected = np.einsum('nve,nte->ntv', np.asarray(tables, float), np.asarray(x, float))
  np.testing.assert_allclose(np.asarray(found, float), expected, atol=0.15)


def test_other_platforms_get_the_plain_product():
  module = embedding.Embed(4096, 8)
  variables = {'params': {'embedding': jnp.ones((4096, 8))}}
  run = jax.jit(lambda x: module.apply(variables, x, method='attend'))
  traced = run.trace(jnp.ones((64, 8)))
  for platform, expected in (('cpu', True), ('tpu', False), ('cuda', False)):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ('optimization_barrier' in text) is expected
