import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxlab import data, quantizers
from jaxlab.models import HookPoint
from jaxlab.quantizers import Rule, lsq, uniform_rules
from jaxlab.quantizers.numerics import affine, learned

EPOCHS, LSQ_EPOCHS, BATCH = 16, 3, 50
MIDDLE = 'conv[123]'


class ConvNet(nn.Module):
  """Four convolutions; the last three are to be quantized."""

  @nn.compact
  def __call__(self, x):
    for i, (width, stride) in enumerate(((8, 1), (16, 2), (16, 1), (32, 1))):
      x = nn.Conv(width, (3, 3), stride, name=f'conv{i}')(x)
      x = HookPoint(name=f'relu{i}')(nn.relu(x))
    return nn.Dense(10, name='fc')(x.mean((1, 2)))


MODEL = ConvNet()


@functools.cache
def digits(split):
  source = data.load('digits', split)
  batch = next(iter(data.epoch_batches(source, len(source))))
  return (jnp.asarray(batch['image']) / 255 - 0.305) / 0.376, jnp.asarray(batch['label'])


def train(forward, params, epochs):
  x, y = digits('train')
  optimizer = optax.adam(2e-3)

  @jax.jit
  def step(params, state, index):
    def loss(params):
      logits = forward(params, x[index])
      return optax.softmax_cross_entropy_with_integer_labels(logits, y[index]).mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  state, rng = optimizer.init(params), np.random.default_rng(0)
  for _ in range(epochs):
    order = rng.permutation(len(x))
    for index in order[: len(x) // BATCH * BATCH].reshape(-1, BATCH):
      params, state = step(params, state, index)
  return params


def accuracy(forward, params):
  x, y = digits('test')
  return 100 * np.mean(np.argmax(jax.jit(forward)(params, x), -1) == y)


@functools.cache
def float_params():
  params = MODEL.init(jax.random.key(0), jnp.zeros((2, 8, 8, 1)))['params']
  return train(lambda params, x: MODEL.apply({'params': params}, x), params, EPOCHS)


def learned_network(bits, params=None):
  rules = uniform_rules(bits, bits, path=MIDDLE, learned=True)
  params = float_params() if params is None else params
  return lsq(MODEL, {'params': params}, digits('train')[0][:BATCH], rules)


@pytest.mark.exhaustive
def test_learned_steps_beat_min_max_and_their_start_by_far_at_two_bits():
  params, images = float_params(), digits('train')[0]
  rules = [Rule(MIDDLE, 'kernel', 2), Rule('relu[012]', 'output', 2)]
  network = quantizers.ptq(MODEL, {'params': params}, images[:512], rules)
  min_max = accuracy(lambda network, x: network(x), network)

  start = learned_network(2)
  forward = lambda trained, x: start.update(**trained)(x)  # noqa: E731
  begin = {name: start.variables[name] for name in ('params', 'lsq')}
  trained = train(forward, begin, LSQ_EPOCHS)
  assert accuracy(forward, trained) >= max(min_max, accuracy(forward, begin)) + 5
  moved = jax.tree.map(lambda new, old: np.abs(new / old - 1).max(), trained['lsq'], begin['lsq'])
  assert min(jax.tree.leaves(moved)) > 1e-3
  kernel = start.update(**trained).unbind()[0]['params']['conv1']['kernel']
  codes = np.round(kernel / trained['lsq']['conv1']['kernel'], 3)
  assert set(np.unique(codes)) == {-2, -1, 0, 1}


def test_steps_are_those_of_a_quantized_forward_pass():
  """Each input is measured behind the quantizers before it; kernels by channel."""
  params, x = float_params(), digits('train')[0][:BATCH]
  found = learned_network(3).variables
  assert set(found['lsq']) == {'conv1', 'conv2', 'conv3'}
  low, high = affine.code_range(3, signed=True)
  for name, own in found['lsq'].items():
    kernel = params[name]['kernel']
    np.testing.assert_array_equal(own['kernel'], learned.lsq_scale(kernel, high, axis=-1))
    codes = found['lsq_codes'][name]
    assert (codes['kernel']['low'], codes['kernel']['high']) == (low, high) == (-4, 3)
    assert (codes['input']['low'], codes['input']['high']) == (0, 7)  # behind a ReLU

  def conv(name, x, kernel, stride):
    y = nn.Conv(kernel.shape[-1], (3, 3), stride).apply(
      {'params': {'kernel': kernel, 'bias': params[name]['bias']}}, x
    )
    return nn.relu(y)

  x = conv('conv0', x, params['conv0']['kernel'], 1)
  for name, stride in (('conv1', 2), ('conv2', 1), ('conv3', 1)):
    step = found['lsq'][name]['input']
    np.testing.assert_allclose(step, 2 * jnp.mean(jnp.abs(x)) / jnp.sqrt(7.0), rtol=1e-5)
    x = jnp.round(jnp.clip(x / step, 0, 7)) * step
    width = found['lsq'][name]['kernel']
    x = conv(name, x, jnp.round(jnp.clip(params[name]['kernel'] / width, -4, 3)) * width, stride)


def test_signed_inputs_get_signed_codes_and_unnamed_layers_none():
  x = digits('train')[0][:8]
  rules = [Rule('fc', 'kernel', 4, learned=True), Rule('conv0|conv1', 'input', 4, learned=True)]
  network = lsq(MODEL, {'params': float_params()}, x, rules)
  found = network.variables
  assert set(found['lsq']) == {'conv0', 'conv1', 'fc'}
  assert set(found['lsq']['fc']) == {'kernel'} and set(found['lsq']['conv0']) == {'input'}
  assert found['lsq_codes']['conv0']['input'] == {'low': -8, 'high': 7}
  assert found['lsq_codes']['conv1']['input'] == {'low': 0, 'high': 15}
  kernels = network.unbind()[0]['params']
  np.testing.assert_array_equal(kernels['conv1']['kernel'], float_params()['conv1']['kernel'])
  assert np.any(kernels['fc']['kernel'] != float_params()['fc']['kernel'])


def test_wrong_rules_and_kernels_are_refused():
  params = float_params()
  with pytest.raises(ValueError, match='conv9'):
    rules = uniform_rules(3, path='conv9', learned=True)
    lsq(MODEL, {'params': params}, jnp.zeros((2, 8, 8, 1)), rules)
  with pytest.raises(ValueError, match=r'must lie in \[2, 8\]'):
    learned_network(9)
  kernel = 0 * params['conv2']['kernel']
  with pytest.raises(ValueError, match=r'conv2: No positive finite step'):
    learned_network(3, {**params, 'conv2': {**params['conv2'], 'kernel': kernel}})
  rules = uniform_rules(3, 3, path=MIDDLE, learned=True)
  dead = {**params, 'conv1': {name: 0 * leaf for name, leaf in params['conv1'].items()}}
  dead['conv1']['kernel'] += 1e-30  # a kernel that has a step, and outputs that are 0
  dead['conv1']['bias'] -= 1
  with pytest.raises(ValueError, match="input of 'conv2' has no step: it is all zeros"):
    lsq(MODEL, {'params': dead}, digits('train')[0][:4], rules)


def test_a_dead_channel_has_the_mean_step_and_the_others_theirs():
  params = float_params()
  kernel = params['conv2']['kernel'].at[..., 3].set(0)
  network = learned_network(3, {**params, 'conv2': {**params['conv2'], 'kernel': kernel}})
  steps = np.ravel(network.variables['lsq']['conv2']['kernel'])
  expected = 2 * np.mean(np.abs(np.asarray(kernel, np.float64)), (0, 1, 2)) / np.sqrt(3)
  expected[3] = np.delete(expected, 3).mean()
  np.testing.assert_allclose(steps, expected, rtol=1e-5)
  assert np.all(np.asarray(network.unbind()[0]['params']['conv2']['kernel'])[..., 3] == 0)
