import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab import models
from jaxlab.evaluation import data_independence, outlier_statistics
from jaxlab.parallel import make_mesh


def outputs(seed=0):
  rng = np.random.default_rng(seed)
  found = [rng.standard_normal((8, 5, 4)), 3 + rng.laplace(size=(8, 2, 3, 6))]
  found[0][3, 2, 1] = -70
  return [jnp.asarray(y, jnp.float32) for y in found]


def test_statistics_are_those_of_numpy_and_scipy():
  got = outlier_statistics(outputs())
  for i, y in enumerate(np.asarray(y, np.float64).ravel() for y in outputs()):
    np.testing.assert_allclose(got.peak[i], np.abs(y).max(), rtol=1e-6)
    np.testing.assert_allclose(got.maximum[i], y.max(), rtol=1e-6)
    np.testing.assert_allclose(got.minimum[i], y.min(), rtol=1e-6)
    np.testing.assert_allclose(got.mean_abs[i], np.abs(y).mean(), rtol=1e-5)
    np.testing.assert_allclose(got.kurtosis[i], scipy.stats.kurtosis(y, fisher=False), rtol=1e-4)


def test_statistics_per_input_are_averaged_over_inputs():
  got = outlier_statistics(outputs(), per_input=True)
  each = [outlier_statistics([y[i] for y in outputs()]) for i in range(8)]
  jax.tree.map(
    lambda mean, *single: np.testing.assert_allclose(mean, np.mean(single, 0), rtol=1e-5),
    got,
    *each,
  )


def test_transformations_agree():
  eager = outlier_statistics(outputs())
  sharding = NamedSharding(make_mesh(), PartitionSpec('data'))
  for given in (outputs(), jax.device_put(outputs(), sharding)):
    got = jax.jit(outlier_statistics)(given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, eager)
  stacked = jnp.stack([outputs()[0]] * 2)
  np.testing.assert_array_equal(outlier_statistics(stacked).peak, [70, 70])


@pytest.mark.exhaustive
def test_large_and_constant_activations_have_finite_kurtosis():
  huge = jnp.asarray([[1e12, -1e12, 1e12, -1e12]])
  half = jnp.asarray([[300.0, -300.0]], jnp.bfloat16)
  got = outlier_statistics([huge, jnp.full((2, 3), 5.0), half])
  np.testing.assert_allclose(got.kurtosis, [1, 0, 1], rtol=1e-5)
  assert got.kurtosis.dtype == jnp.float32


@pytest.mark.exhaustive
def test_outliers_of_the_weights_show_with_any_data():
  model = models.ViT(4, 8, 16, 2, 2, num_classes=3)
  parts = models.anatomy(model)
  x = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
  drawn = jax.jit(model.init)(jax.random.key(1), x)
  flat = models.map_matching(lambda _, k: 60 * k, drawn['params'], r'blocks_1/mlp/fc\d/kernel')

  def block_outputs(variables, x):
    _, captured = models.capture(model, variables, [models.any_of(parts.block_paths)], x)
    return models.block_outputs(captured, parts)

  noise = (jax.random.uniform(jax.random.key(2), x.shape) * 255 - 127) / 60
  found = data_independence(jax.jit(block_outputs), {'params': flat}, drawn, x, noise)
  assert found.drawn.peak[1] < 10 < 50 < min(found.trained.peak[1], found.noise.peak[1])
  expected = outlier_statistics(jax.jit(block_outputs)({'params': flat}, noise), per_input=True)
  jax.tree.map(np.testing.assert_array_equal, found.noise, expected)


@pytest.mark.parametrize(
  ('given', 'options', 'message'),
  [
    ([], {}, 'no block'),
    ([jnp.zeros((0, 3))], {}, r'not empty, got \(0, 3\)'),
    ([jnp.zeros(3)], {'per_input': True}, r'\[batch, ...\] and not empty, got \(3,\)'),
  ],
)
def test_bad_outputs_are_named(given, options, message):
  with pytest.raises(ValueError, match=message):
    outlier_statistics(given, **options)
