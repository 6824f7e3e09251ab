import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close
from models.random_variables import run_capture

from jaxlab import losses, models

SMALL = {'widths': (8, 8, 16), 'hidden': (8, 8)}


@pytest.fixture(scope='module')
def case():
  model = models.create('pointnet', num_classes=3, **SMALL)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 10, 5)), jnp.float32)
  return model, jax.jit(model.init)(jax.random.key(0), x), x


def test_the_order_of_the_points_is_of_no_account(case):
  model, variables, x = case
  order = np.random.default_rng(1).permutation(10)
  expected = jax.jit(model.apply)(variables, x)
  assert expected.shape == (4, 3)
  assert_close(jax.jit(model.apply)(variables, x[:, order]), expected)
  again = jnp.concatenate([x, x[:, :3]], 1)  # nor is it, how often a point occurs
  assert_close(jax.jit(model.apply)(variables, again), expected)


def test_transforms_multiply_coordinates_and_features(case):
  model, variables, x = case
  paths = ['input_transform/matrix', 'feature_transform/matrix', 'mlp1', 'maxpool']
  _, parts = run_capture(model, variables, paths, x)
  first, second = (parts[path] for path in paths[:2])
  assert first.shape == (4, 3, 3) and second.shape == (4, 8, 8)
  turned = jnp.concatenate([x[..., :3] @ first, x[..., 3:]], -1)
  names = ('params', 'batch_stats')

  def part(name, value):
    own = {collection: variables[collection][name] for collection in names}
    sizes = {'mlp1': ((8,), True), 'mlp2': ((8, 16), False)}[name]
    return models.pointnet.SharedMLP(*sizes).apply(own, value)

  assert_close(parts['mlp1'], part('mlp1', turned))
  assert_close(parts['maxpool'], part('mlp2', parts['mlp1'] @ second).max(1))


@pytest.mark.exhaustive
def test_dropout_stands_before_the_last_norm_of_the_head(case):
  model, variables, x = case
  features = model.clone(num_classes=None)
  own = {name: {k: v for k, v in tree.items() if k != 'head'} for name, tree in variables.items()}
  assert jax.jit(features.apply)(own, x).shape == (4, 16)
  run = lambda key: model.apply(  # noqa: E731
    variables, x, train=True, mutable=['batch_stats'], rngs={'dropout': jax.random.key(key)}
  )
  (a, stats), (b, others) = run(0), run(1)
  assert np.any(a != b)
  means = [tree['batch_stats']['head'] for tree in (stats, others)]
  np.testing.assert_array_equal(means[0]['bn0']['mean'], means[1]['bn0']['mean'])
  assert np.any(means[0]['bn1']['mean'] != means[1]['bn1']['mean'])


def test_the_full_network_has_the_published_size():
  x = jax.ShapeDtypeStruct((2, 64, 3), jnp.float32)
  variables = jax.eval_shape(models.create('pointnet').init, jax.random.key(0), x)
  size = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  assert round(size / 1e6, 1) == 3.5  # Qi et al. 2017, table 6


def test_orthogonal_transforms_cost_nothing():
  rng = np.random.default_rng(0)
  matrices = rng.normal(size=(3, 4, 4))
  gram = np.eye(4) - matrices @ matrices.transpose(0, 2, 1)
  assert_close(losses.orthogonality_loss(matrices), np.sqrt((gram**2).sum((1, 2))))
  value, gradient = jax.value_and_grad(losses.orthogonality_loss)(jnp.eye(4))
  assert float(value) == 0 and not np.any(gradient)
  with pytest.raises(ValueError, match='size, size'):
    losses.orthogonality_loss(np.ones((2, 3)))


def test_what_is_no_cloud_is_named(case):
  model, variables, x = case
  for wrong in (x[..., :2], x[0], x.astype(jnp.int32)):
    with pytest.raises(ValueError, match=r'floats \[batch, points'):
      model.apply(variables, wrong)
