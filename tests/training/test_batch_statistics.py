import jax
import numpy as np
import pytest

from jaxlab import models
from jaxlab.training import recompute_batch_stats


def in_eval_mode(site, call, x, *_, **__):
  return call(x, False)


def test_recomputed_statistics_are_the_mean_of_the_batches():
  model = models.create('cifar_resnet18', stage_sizes=(1,), strides=(1,), width=4, num_classes=None)
  batches = jax.random.normal(jax.random.key(0), (3, 6, 5, 5, 3))
  variables = jax.jit(model.init)(jax.random.key(1), batches[0])
  found = recompute_batch_stats(model, variables, batches)
  outputs = models.capture(model, variables, ['conv1'], batches.reshape(-1, 5, 5, 3))[1]['conv1']
  outputs = np.asarray(outputs).reshape(3, -1, 4)
  stem = found['batch_stats']['bn1']
  np.testing.assert_allclose(stem['mean'], outputs.mean((0, 1)), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(stem['var'], outputs.var(1, ddof=1).mean(0), rtol=1e-4)
  assert found['params'] is variables['params']

  hooks = (models.Hook('bn1', call=in_eval_mode),)
  kept = recompute_batch_stats(model, variables, batches, hooks=hooks, keep=('bn1',))
  other = kept['batch_stats']
  for name, value in variables['batch_stats']['bn1'].items():
    np.testing.assert_array_equal(other['bn1'][name], value)
  conv = 'layer1_0/conv1'  # behind the stem alone, which is in eval mode
  outputs = models.capture(model, variables, [conv], batches.reshape(-1, 5, 5, 3))[1][conv]
  mean = np.asarray(outputs).reshape(-1, 4).mean(0)
  np.testing.assert_allclose(other['layer1_0']['bn1']['mean'], mean, rtol=1e-4, atol=1e-5)


def test_no_batch_is_refused():
  with pytest.raises(ValueError, match='no batch'):
    recompute_batch_stats(models.create('linear', num_classes=2), {'batch_stats': {}}, [])
