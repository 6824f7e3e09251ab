"""CNN-13: its layers one by one, noise and dropout in training alone, its size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close
from models.random_variables import random_images, random_variables, run

from jaxlab.models import CNN13, create

TINY = CNN13((3, 4, 5, 4, 3), num_classes=2)
IMAGES = random_images((2, 12, 12, 3))


def reference(variables, x):
  params, stats = variables['params'], variables['batch_stats']
  for i in range(9):
    padding = 'SAME' if i < 6 else 'VALID'
    names = ('NHWC', 'HWIO', 'NHWC')
    own = params[f'conv{i}']
    x = jax.lax.conv_general_dilated(x, own['kernel'], (1, 1), padding, dimension_numbers=names)
    x = (x + own['bias'] - stats[f'bn{i}']['mean']) / np.sqrt(stats[f'bn{i}']['var'] + 1e-5)
    x = x * params[f'bn{i}']['scale'] + params[f'bn{i}']['bias']
    x = jnp.where(x > 0, x, 0.1 * x)
    if i in (2, 5):
      batch, side, _, channels = x.shape
      x = x.reshape(batch, side // 2, 2, side // 2, 2, channels).max((2, 4))
  return x.mean((1, 2)) @ params['fc']['kernel'] + params['fc']['bias']


@pytest.mark.exhaustive
def test_thirteen_layers_are_nine_convolutions_two_pools_a_mean_and_a_classifier():
  variables = random_variables(TINY, IMAGES)
  assert_close(run(TINY, variables, IMAGES), reference(variables, IMAGES), 1e-4)


def test_noise_and_dropout_are_drawn_in_training_alone():
  variables = random_variables(TINY, IMAGES)

  @functools.partial(jax.jit, static_argnums=0)
  def train(model, seed):
    rngs = {'dropout': jax.random.key(seed)}
    return model.apply(variables, IMAGES, True, rngs=rngs, mutable=['batch_stats'])[0]

  for fields in ({'noise': 0.15, 'dropout': 0.0}, {'noise': 0.0, 'dropout': 0.5}):
    model = TINY.clone(**fields)
    assert np.abs(train(model, 0) - train(model, 1)).max() > 1e-3
  still = TINY.clone(noise=0.0, dropout=0.0)
  np.testing.assert_array_equal(train(still, 0), train(still, 1))


def test_it_has_the_known_number_of_parameters_and_no_smaller_images():
  # 3.1 million.
  convolutions = 9 * 3 * 128 + 9 * 128 * (2 * 128 + 256) + 9 * 256 * (2 * 256 + 512)
  convolutions += 512 * 256 + 256 * 128
  rest = 3 * (3 * 128 + 3 * 256 + 512 + 256 + 128) + 129 * 10
  shapes = jax.eval_shape(create('cnn13').init, jax.random.key(0), random_images((1, 32, 32, 3)))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes['params'])) == convolutions + rest
  with pytest.raises(ValueError, match='11 x 12 pixels; give at least 12'):
    jax.eval_shape(TINY.init, jax.random.key(0), IMAGES[:, 1:])


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'widths': (3, 4)}, 'expected five positive'),
    ({'dropout': 1.0}, 'dropout=1.0'),
    ({'noise': -0.1}, 'noise=-0.1'),
    ({'num_classes': 0}, 'num_classes=0'),
  ],
)
def test_a_network_that_cannot_be_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    TINY.clone(**fields)
