"""Shake-Shake networks: parity of a block, what training mixes, the published size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from models.random_variables import random_images, random_variables, run

from jaxlab.models import ShakeShake, ShakeShakeBlock, create, from_torch, shake, to_torch

TINY = ShakeShake((1, 1), (4, 6), 3, num_classes=3)
IMAGES = random_images((4, 8, 8, 3))


@golden('r2d2', 'shakeshake_block_eval')
def test_a_block_agrees_with_official_code(vectors):
  x = jnp.asarray(vectors['in_features_nchw'].transpose(0, 2, 3, 1))
  out = vectors['out_features_nchw'].transpose(0, 2, 3, 1)
  block = ShakeShakeBlock(out.shape[-1], vectors.param('stride'))
  weights = {n.replace('__', '.'): a for n, a in vectors.tree('param_').items() if n != 'stride'}
  variables = from_torch(jax.eval_shape(block.init, jax.random.key(0), x), weights)
  assert_close(run(block, variables, x), out, 1e-5)


def test_values_and_gradients_are_mixed_by_shares_of_their_own():
  keys = jax.random.split(jax.random.key(0), 5)
  a, b, cotangent = (jax.random.normal(key, (4, 2, 3)) for key in keys[:3])
  forward, backward = (jax.random.uniform(key, (4,)) for key in keys[3:])
  y, pull = jax.vjp(lambda a, b, g: shake(a, b, g, backward), a, b, forward)
  wide = lambda share: share[:, None, None]  # noqa: E731
  assert_close(y, wide(forward) * a + wide(1 - forward) * b)
  of_a, of_b, of_share = pull(cotangent)
  assert_close(of_a, wide(backward) * cotangent)
  assert_close(of_b, wide(1 - backward) * cotangent)
  np.testing.assert_array_equal(of_share, 0)
  jitted = jax.jit(jax.vmap(shake))(*(leaf[None] for leaf in (a, b, forward, backward)))[0]
  assert_close(jitted, y, 1e-6)
  with pytest.raises(ValueError, match=r'forward must be \[4\], got \[3\]'):
    shake(a, b, forward[:3], backward)
  with pytest.raises(ValueError, match='branches must have one shape'):
    shake(a, b[:3], forward, backward)


def test_every_example_draws_its_own_share_and_the_gradient_another():
  block = ShakeShakeBlock(3)
  x = jnp.repeat(random_images((1, 4, 4, 3)), 4, 0)
  variables = random_variables(block, x)
  seen = []
  for seed in range(2):
    rngs = {'dropout': jax.random.key(seed)}
    y, _ = block.apply(variables, x, True, rngs=rngs, mutable=['batch_stats'])
    seen.append(np.asarray(y))
  assert np.abs(np.diff(seen[0], axis=0)).max((1, 2, 3)).min() > 1e-3
  assert np.abs(seen[0] - seen[1]).max() > 1e-3
  still = run(block, variables, x)
  np.testing.assert_allclose(still[1:], still[:-1], rtol=1e-6)


@pytest.mark.exhaustive
def test_names_round_trip_and_remat_and_bfloat16_change_little():
  variables = random_variables(TINY, IMAGES)
  back = from_torch(TINY, to_torch(variables))
  jax.tree.map(np.testing.assert_array_equal, back, variables)

  def step(model):
    def loss(params):
      own = {**variables, 'params': params}
      rngs = {'dropout': jax.random.key(1)}
      y, _ = model.apply(own, IMAGES, True, mutable=['batch_stats'], rngs=rngs)
      return jnp.mean(jnp.sin(3 * y))

    return jax.jit(jax.value_and_grad(loss))(variables['params'])

  plain = step(TINY)
  jax.tree.map(lambda a, b: assert_close(a, b, 1e-4, 1e-5), step(TINY.clone(remat=True)), plain)
  for path, leaf in jax.tree_util.tree_leaves_with_path(plain[1]):
    assert np.isfinite(leaf).all() and np.any(leaf != 0), jax.tree_util.keystr(path)
  low = run(TINY.clone(dtype=jnp.bfloat16), variables, IMAGES)
  assert low.dtype == jnp.bfloat16
  assert_close(low, run(TINY, variables, IMAGES), 0.1)


def test_26_layers_of_96_channels_have_the_published_number_of_parameters():
  # 26.2 million, table 1 of Gastaldi 2017.
  model = create('shake_shake26_2x96d')
  shapes = jax.eval_shape(model.init, jax.random.key(0), random_images((1, 32, 32, 3)))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes['params'])) == pytest.approx(
    26.2e6, rel=2e-3
  )


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'widths': (4,)}, '2 stages of at least one block'),
    ({'widths': (4, 5)}, 'expected even numbers'),
    ({'num_classes': 0}, 'num_classes=0'),
  ],
)
def test_a_network_that_cannot_be_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    TINY.clone(**fields)


def test_maps_that_cannot_be_halved_are_told():
  with pytest.raises(ValueError, match='7 x 7 cannot be halved'):
    jax.eval_shape(TINY.init, jax.random.key(0), IMAGES[:, :7, :7])
