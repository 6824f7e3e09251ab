import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close
from models.random_variables import random_images, random_variables, run

from jaxlab.models import ClassAttention, ConvNet, MapClassifier, module_paths


def test_each_class_judges_the_features_of_the_places_that_it_looks_at():
  x = random_images((2, 3, 4, 5))
  model = ClassAttention(3)
  params = random_variables(model, x)['params']
  flat = x.reshape(2, 12, 5)
  scores = flat @ params['attention']['kernel'] + params['attention']['bias']
  weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
  expected = np.stack(
    [
      (weights[:, :, k, None] * flat).sum(1) @ params['kernel'][:, k] + params['bias'][k]
      for k in range(3)
    ],
    1,
  )
  assert_close(jax.jit(model.apply)({'params': params}, x), expected, 1e-5)
  assert module_paths(model, x) == ['attention', 'weights']
  low = jax.jit(model.clone(dtype=jnp.bfloat16).apply)({'params': params}, x)
  assert low.dtype == jnp.bfloat16
  assert_close(low, expected, 0.05)


def test_it_stands_over_the_map_that_a_network_would_pool():
  model = MapClassifier(ConvNet((4, 6), hidden=()), ClassAttention(3))
  x = random_images((2, 8, 8, 1))
  variables = random_variables(model, x)
  assert run(model, variables, x).shape == (2, 3)
  assert variables['params']['head']['kernel'].shape == (6, 3)


def test_what_is_no_map_is_refused():
  with pytest.raises(ValueError, match='expected a map'):
    jax.eval_shape(ClassAttention(3).init, jax.random.key(0), jnp.zeros((2, 5)))
