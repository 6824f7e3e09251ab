"""Channels of zeros, constants, inputs that are 0 throughout: others keep their scales, and it is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from golden_vectors import assert_close
from models.random_variables import call, run_capture

from jaxlab import models, quantizers
from jaxlab.models import HookPoint
from jaxlab.quantizers import Rule, uniform_rules

RNG = np.random.default_rng(0)


class Net(nn.Module):
  """A convolution, a ReLU with a path, a dense layer, and one that is called in training alone."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(6, (3, 3), name='conv')(x)
    x = HookPoint(name='relu')(nn.relu(x))
    y = nn.Dense(4, name='fc')(x.mean((1, 2)))
    if train or self.is_initializing():
      y = y + nn.Dense(4, name='auxiliary')(x.mean((1, 2)))
    return y


NET = Net()
X = jnp.asarray(RNG.normal(size=(8, 6, 6, 3)), jnp.float32)


def variables(dead=(2,)):
  """Channels of the convolution that are pruned."""
  own = jax.tree.map(np.array, NET.init(jax.random.key(0), X))
  for channel in dead:
    own['params']['conv']['kernel'][..., channel] = 0
    own['params']['conv']['bias'][channel] = -0.5  # its ReLU is dead, too
  return own


def half_range(kernel, bits):
  kernel = np.asarray(kernel, np.float64)
  largest = np.abs(kernel).max((0, 1, 2), keepdims=True)
  scale = np.where(largest == 0, 1, largest) / ((2**bits - 1) / 2) * (1 - 2.0**-21)
  return np.clip(np.round(kernel / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


@pytest.mark.exhaustive
def test_a_pruned_filter_keeps_no_other_in_float():
  given = variables()
  expected = half_range(given['params']['conv']['kernel'], 4)
  quantized = quantizers.quantize_weights(given['params'], uniform_rules(4))
  assert_close(quantized['conv']['kernel'], expected, 1e-5)
  network = quantizers.ptq(NET, given, X, uniform_rules(4))
  assert_close(network.variables['params']['conv']['kernel'], expected, 1e-5)
  kept = quantizers.quantize_weights(given['params'], uniform_rules(4), degenerate='tensor')
  np.testing.assert_array_equal(kept['conv']['kernel'], given['params']['conv']['kernel'])


def test_every_layer_of_a_pruned_resnet_is_quantized():
  model = models.create('cifar_resnet20', width=4, num_classes=3)
  x = jnp.asarray(RNG.normal(size=(2, 8, 8, 3)), jnp.float32)
  given = jax.tree.map(np.array, jax.jit(model.init)(jax.random.key(0), x))
  flat = traverse_util.flatten_dict(given['params'], sep='/')
  convs = [path for path, leaf in flat.items() if path.endswith('kernel') and leaf.ndim == 4]
  for path in convs:
    flat[path][..., 1] = 0
  network = quantizers.ptq(model, given, x, uniform_rules(3))
  found = traverse_util.flatten_dict(network.variables['params'], sep='/')
  for path in convs:
    assert_close(found[path], half_range(flat[path], 3), 1e-5)
    assert network.operands()[path.removesuffix('/kernel')] == {'kernel': 3}
  assert not network.skipped


def test_dead_channels_of_an_activation_leave_the_others_quantized():
  given = variables()
  rules = [Rule('relu', 'output', 4, granularity='channel')]
  network = quantizers.ptq(NET, given, X, rules)
  y = np.asarray(run_capture(NET, given, ['relu'], X)[1]['relu'], np.float64)
  low, high = y.min((0, 1, 2)), y.max((0, 1, 2))
  assert low[2] == high[2] == 0
  scale = np.where(high > low, high - low, 15) / 15
  expected = (
    np.clip(np.round(y / scale) - np.round(low / scale), 0, 15) + np.round(low / scale)
  ) * scale
  variables_, hooks = network.unbind()
  found = models.capture(NET, variables_, ['relu'], X, hooks=hooks)[1]['relu']
  assert_close(found, expected, 1e-5)
  assert not network.skipped
  ranges = quantizers.collect_ranges(NET, given, X, rules)
  hooks = quantizers.fake_quantize_hooks(rules)
  found = models.capture(NET, {**given, 'ranges': ranges}, ['relu'], X, hooks=hooks)[1]['relu']
  assert_close(found, expected, 1e-5)


def test_what_was_zero_throughout_stays_in_float_and_is_said():
  given = variables(range(6))
  given['params']['fc']['bias'][:] = [1, -1, 0.5, 2]
  given['params']['conv']['kernel'][..., 0, 0] = (
    1e-3  # a kernel with values, whose outputs are below 0
  )
  network = quantizers.ptq(NET, given, X, uniform_rules(4, outputs=4, path='conv|relu|fc'))
  assert dict(network.skipped) == {'relu': 'the range of its output has no extent'}
  assert network.operands() == {
    'conv': {'kernel': 4, 'output': 4},
    'fc': {'kernel': 4, 'output': 4},
  }
  assert repr(network).endswith(', in float: relu)')
  assert network.summary().split('\n') == [
    '2 kernels of 4 bits, 2 outputs of 4 bits',
    'relu in float: the range of its output has no extent',
  ]
  network = quantizers.percentile_ptq(NET, given, X, uniform_rules(4, 8, path='conv|fc'))
  reason = 'the range of its input has no extent'
  assert dict(network.skipped) == {'fc': reason}
  assert quantizers.integer_network(network).skipped['fc'] == reason
  assert network.operands() == {'conv': {'kernel': 4, 'input': 8}, 'fc': {'kernel': 4}}
  compensated = quantizers.compensation.compensate(
    network, X, quantizers.compensation.QwTv2('block'), blocks='conv', dtype=jnp.float32
  )
  assert dict(compensated.skipped) == {'fc': reason}


def test_kernels_that_the_model_does_not_call_are_said():
  given = variables()
  network = quantizers.percentile_ptq(NET, given, X, uniform_rules(4, 8))
  assert dict(network.skipped) == {'auxiliary': 'the model does not call it'}
  np.testing.assert_array_equal(
    network.variables['params']['auxiliary']['kernel'], given['params']['auxiliary']['kernel']
  )


class Several(nn.Module):
  """Modules that return no array of floats, and one under a scan that carries no ranges."""

  @nn.compact
  def __call__(self, x):
    class Pair(nn.Module):
      @nn.compact
      def __call__(self, x):
        return x, 2 * x

    class Count(nn.Module):
      @nn.compact
      def __call__(self, x):
        return jnp.argmax(x, -1)

    class Step(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return nn.Dense(x.shape[-1], name='fc')(x), None

    over = {'variable_axes': {'params': 0}, 'split_rngs': {'params': True}, 'length': 2}
    x, _ = nn.scan(Step, **over)(name='steps')(x, None)
    a, b = Pair(name='pair')(x)
    return HookPoint(name='sum')(a + b + Count(name='count')(x)[:, None])


def test_outputs_that_cannot_be_quantized_are_said():
  x = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
  model = Several()
  given = model.init(jax.random.key(0), x)
  network = quantizers.ptq(
    model, given, x, uniform_rules(outputs=8, path='(pair|count|sum|steps/fc)')
  )
  assert dict(network.skipped) == {
    'steps/fc': 'it runs under nn.scan or nn.vmap, which carry no ranges of outputs',
    'pair': 'it returns a tuple',
    'count': 'it returns int32',
  }
  assert network.operands() == {'sum': {'output': 8}}
  assert np.all(np.isfinite(call(network, x)))


@pytest.mark.parametrize('value', [5.0, -0.7, 0.0])
@pytest.mark.parametrize('method', ['ptq', 'percentile_ptq', 'gptq'])
def test_constant_kernels_keep_their_value(value, method):
  model = nn.Sequential([nn.Dense(3)])
  x = jnp.asarray(RNG.normal(size=(16, 4)), jnp.float32)
  given = jax.tree.map(np.array, model.init(jax.random.key(0), x))
  given['params']['layers_0']['kernel'][:, 1] = value
  if method == 'gptq':
    hessian = quantizers.accumulate_hessian(quantizers.init_hessian(4), x).hessian
    kernel = quantizers.gptq_kernel(
      jnp.asarray(given['params']['layers_0']['kernel']), hessian, 4
    ).kernel
  else:
    rule = quantizers.AffineQuantizer(rule='asymmetric', granularity='channel')
    options = {'kernels': rule} if method == 'ptq' else {}
    network = getattr(quantizers, method)(model, given, x, uniform_rules(4), **options)
    kernel = network.variables['params']['layers_0']['kernel']
    own = network.variables['quantization']['layers_0']['kernel']
    codes = np.asarray(kernel, np.float64) / own['scale'] + own['zero_point']
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
  np.testing.assert_allclose(kernel[:, 1], value, rtol=1e-6)
  assert len(np.unique(kernel[:, 0])) > 2
