import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from models.random_variables import run_capture

from jaxlab import models

VIT = {'image_size': 16, 'patch_size': 8, 'width': 8, 'depth': 1, 'num_heads': 2}
NETWORKS = {
  'resnet': models.ResNet((1, 1), width=4, stem='cifar', num_classes=3),
  'mobilenetv2': models.MobileNetV2(
    (1, 2), (4, 6), (1, 2), stem='cifar', stem_width=4, head_width=8
  ),
  'vgg': models.VGG((1, 1), (4, 6), batch_norm=True, hidden=None),
  'vit': models.ViT(**VIT, distilled=True, registers=2, dynamic_image_size=True),
}


def images(*size):
  return jnp.asarray(np.random.default_rng(0).normal(size=(2, *size, 3)), jnp.float32)


@pytest.mark.parametrize(('name', 'grid'), tables.some([
  ('resnet', (8, 12)), ('mobilenetv2', (8, 12)), ('vgg', (4, 6)), ('vit', (2, 3)),
], 4))  # fmt: skip
def test_the_map_is_what_the_network_pools(name, grid):
  model, x = NETWORKS[name], images(16, 24)
  variables = jax.jit(model.init)(jax.random.key(0), images(16, 16))
  found = models.feature_map(model.bind(variables), x)
  assert found.shape[:3] == (2, *grid)
  (_, captured) = run_capture(model, variables, ['norm' if name == 'vit' else 'avgpool'], x)
  if name == 'vit':
    tokens = captured['norm']
    for row in range(2):
      for column in range(3):
        own = tokens[:, model.num_prefix_tokens + 3 * row + column]
        np.testing.assert_array_equal(found[:, row, column], own)
  else:
    np.testing.assert_allclose(found.mean((1, 2)), captured['avgpool'], rtol=1e-5, atol=1e-6)


@pytest.mark.exhaustive
def test_a_classifier_over_the_map_trains_all_of_its_network():
  model = models.MapClassifier(
    NETWORKS['resnet'].clone(num_classes=None), models.CSRAMultiHead(5, 2, 0.5)
  )
  x = images(16, 16)
  variables = jax.jit(model.init)(jax.random.key(0), x)
  assert set(variables['params']) == {'backbone', 'head'}

  def total(params):
    logits, state = model.apply(
      {**variables, 'params': params}, x, train=True, mutable=['batch_stats']
    )
    return jnp.sum(logits**2), (logits, state)

  grads, (logits, state) = jax.jit(jax.grad(total, has_aux=True))(variables['params'])
  assert logits.shape == (2, 5)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
  old = jax.tree.leaves(variables['batch_stats'])
  assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(state), old, strict=True))
  features = model.apply(variables, x, method='features')
  head = models.csra_logits(features, variables['params']['head']['weight'], (1.0, np.inf), 0.5)
  np.testing.assert_allclose(jax.jit(model.apply)(variables, x), head, rtol=1e-5, atol=1e-5)
  assert models.anatomy(model).stem == ('backbone/conv1',)
  # Hooks on modules in front of the map reach it.
  off = models.Hook('backbone/layer2_0/relu2', output=lambda site, y: jnp.zeros_like(y))
  assert not np.any(models.apply(model, variables, x, hooks=[off]))


def test_maps_of_another_path_and_of_networks_that_are_not_known():
  model = NETWORKS['vgg']
  x = images(16, 16)
  variables = jax.jit(model.init)(jax.random.key(0), x)
  bound = model.bind(variables)
  assert models.feature_map(bound, x, path='blocks_1_0').shape == (2, 8, 8, 6)
  with pytest.raises(ValueError, match='no map of features'):
    models.feature_map(bound, x, path='avgpool')
  with pytest.raises(ValueError, match='blocks_9'):
    models.feature_map(bound, x, path='blocks_9')
  with pytest.raises(ValueError, match=r'Dense is not known.*path='):
    models.feature_map_path(nn.Dense(3))
  rolled = NETWORKS['resnet'].clone(remat=True)
  with pytest.raises(ValueError, match='remat=False'):
    jax.eval_shape(models.MapClassifier(rolled, models.CSRAMultiHead(5)).init, jax.random.key(0), x)
