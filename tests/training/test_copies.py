"""Copies of a training with hyperparameters of their own: each as if it were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import assert_close
from models.random_variables import random_images, random_variables

from jaxlab import adapters, models, training
from jaxlab.models import ViT

RATES, DECAYS = (1e-3, 3e-3, 1e-2, 3e-2), (0.0, 0.05, 0.5, 0.0)
STEPS = 6
SCHEDULE = optax.cosine_decay_schedule(1.0, STEPS)


def test_side_networks_at_once_are_those_trained_alone_by_one_forward_pass_a_batch():
  images = jnp.asarray(random_images((4, 8, 8, 3)))
  model = ViT(patch_size=4, image_size=8, width=8, depth=2, num_heads=2)
  variables, labels = random_variables(model, images), jnp.array([0, 1, 2, 0])
  norm = variables['params']['norm']
  calls: list[int] = []

  def features(batch):
    def seen(site, x):
      jax.debug.callback(lambda: calls.append(1))
      return x

    hook = models.Hook('', input=seen)
    return adapters.collect_features(model, variables, batch, hooks=[hook])

  def init(key):
    side_key, head_key = jax.random.split(key)
    side = adapters.init_attention_side_network(side_key, 8, 2, rank=2, modules=1)
    return {'side': side, 'head': adapters.init_head(head_key, 8, 3)}

  def loss(own, z):
    y = adapters.apply_attention_side_network(own['side'], z)
    logits = adapters.token_logits(own['head'], norm, y)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  keys = jax.random.split(jax.random.key(0), len(RATES))
  together = optax.chain(
    training.optimizer_of_copies(optax.adamw, {'learning_rate': RATES, 'weight_decay': DECAYS}),
    optax.scale_by_schedule(SCHEDULE),
  )

  def train(params, optimizer, value):
    @jax.jit
    def step(params, state, batch):
      gradients = jax.grad(value)(params, features(batch))
      updates, state = optimizer.update(gradients, state, params)
      return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for i in range(STEPS):
      params, state = step(params, state, images + 0.1 * i)
    jax.effects_barrier()
    return params

  def total(params, z):
    return jnp.sum(jax.vmap(loss, in_axes=(0, None))(params, z))

  found = train(training.stack_copies(init, keys), together, total)
  assert len(calls) == STEPS
  for i, (rate, decay) in enumerate(zip(RATES, DECAYS, strict=True)):
    # The rate's schedule within the optimizer, as a training alone has it.
    own = optax.adamw(lambda step, rate=rate: rate * SCHEDULE(step), weight_decay=decay)
    alone = train(init(keys[i]), own, loss)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5, 1e-6), training.copy_at(found, i), alone)
  assert len(calls) == STEPS * (1 + len(RATES))
  last = [training.copy_at(found, i)['head']['kernel'] for i in range(4)]
  assert np.abs(last[0] - last[3]).max() > 1e-3


@pytest.mark.parametrize(
  'values, message',
  [
    ({}, 'expected some'),
    ({'learning_rate': 1e-3}, r'all \[copies\]'),
    ({'learning_rate': [1e-3, 1e-2], 'weight_decay': [0.0]}, r'all \[copies\]'),
  ],
)
def test_hyperparameters_that_do_not_fit_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    training.optimizer_of_copies(optax.adamw, values)


def test_parameters_of_another_number_of_copies_are_refused():
  optimizer = training.optimizer_of_copies(optax.sgd, {'learning_rate': [1.0, 2.0]})
  with pytest.raises(ValueError, match=r"\['w'\] has shape \(3,\): expected 2 copies"):
    optimizer.init({'w': jnp.ones(3)})
  state = optimizer.init({'w': jnp.ones((2, 3))})
  moved, _ = optimizer.update({'w': jnp.ones((2, 3))}, state)
  np.testing.assert_array_equal(moved['w'], [[-1.0] * 3, [-2.0] * 3])
