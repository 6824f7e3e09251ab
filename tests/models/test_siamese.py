import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import models


def test_an_encoder_may_return_its_features_too():
  parts = models.MLP((5,), num_classes=None), models.MLPHead((4, 3))
  x = jax.random.normal(jax.random.key(0), (6, 2))
  plain, both = models.Encoder(*parts), models.Encoder(*parts, with_features=True)
  variables = jax.jit(plain.init)(jax.random.key(1), x)
  features, projections = jax.jit(both.apply)(variables, x)
  np.testing.assert_array_equal(projections, jax.jit(plain.apply)(variables, x))
  own = {'params': variables['params']['backbone']}
  np.testing.assert_array_equal(features, jax.jit(parts[0].apply)(own, x))
  views, _ = models.apply_in_turn(both, variables, [x, x + 1])
  assert [z.shape for z in jax.tree.leaves(views)] == [(6, 5), (6, 3)] * 2


def test_every_view_draws_for_itself():
  vit = models.ViT(patch_size=4, image_size=8, width=8, depth=2, num_heads=2, drop_path=0.5)
  image = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
  variables = jax.jit(vit.init)(
    {'params': jax.random.key(1), 'drop_path': jax.random.key(2)}, image
  )

  @jax.jit
  def features(key):
    return models.apply_in_turn(vit, variables, [image, image], rngs={'drop_path': key})[0]

  first, second = features(jax.random.key(3))
  assert jnp.max(jnp.abs(first - second)) > 1e-3
  np.testing.assert_array_equal(features(jax.random.key(3))[0], first)
