import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close
from models.random_variables import random_images, random_variables, run

from jaxlab.models import create, module_paths
from jaxlab.models.mlp import MLP


def test_an_mlp_is_affine_maps_with_relus_between_over_the_flat_input():
  x = random_images((3, 2, 2, 2))
  model = MLP((5, 4), num_classes=3)
  params = random_variables(model, x)['params']
  y = x.reshape(3, 8)
  for name in ('fc0', 'fc1'):
    y = np.maximum(y @ params[name]['kernel'] + params[name]['bias'], 0)
  features = run(MLP((5, 4)), {'params': {k: params[k] for k in ('fc0', 'fc1')}}, x)
  assert_close(features, y, 1e-5)
  logits = run(model, {'params': params}, x)
  assert_close(logits, y @ params['fc']['kernel'] + params['fc']['bias'], 1e-5)
  assert module_paths(model, x) == ['fc0', 'relu0', 'fc1', 'relu1', 'fc']


def test_linear_is_an_mlp_without_hidden_layers():
  x = random_images((3, 8))
  assert set(random_variables(create('linear', num_classes=3), x)['params']) == {'fc'}
  assert create('mlp').hidden == (64, 64)
  np.testing.assert_array_equal(run(create('linear', num_classes=None), {}, x), x)


def test_layers_start_within_torchs_bounds_and_bfloat16_is_close():
  x = random_images((8, 25))
  variables = jax.jit(MLP((400,), 3).init)(jax.random.key(0), x)
  for name in ('kernel', 'bias'):
    assert 0.19 < float(jnp.abs(variables['params']['fc0'][name]).max()) <= 0.2  # 1 / sqrt(25)
  low = run(MLP((400,), 3, dtype=jnp.bfloat16), variables, x)
  assert low.dtype == jnp.bfloat16
  assert_close(low, run(MLP((400,), 3), variables, x), 0.05)


@pytest.mark.parametrize('fields', [{'hidden': (3, 0)}, {'num_classes': 0}])
def test_sizes_below_one_raise(fields):
  with pytest.raises(ValueError, match='must be positive'):
    MLP(**fields)


@pytest.mark.parametrize('x', [np.zeros((2, 3), np.uint8), np.zeros(3, np.float32)])
def test_inputs_other_than_batches_of_floats_raise(x):
  with pytest.raises(ValueError, match='must be floats'):
    jax.eval_shape(MLP(num_classes=3).init, jax.random.key(0), x)
