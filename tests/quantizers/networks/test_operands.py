import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from golden_vectors import assert_close, golden
from models.random_variables import call, random_images, random_variables

from jaxlab import models
from jaxlab.models import HookPoint, ResNet, apply
from jaxlab.models.intercept import Hook
from jaxlab.quantizers.networks import operands
from jaxlab.quantizers.networks.input_ranges import recalibration_hook
from jaxlab.quantizers.networks.operands import (
  TENSOR,
  affine_constants,
)
from jaxlab.quantizers.networks.percentile import percentile_ptq
from jaxlab.quantizers.networks.rules import EDGES, Rule, decide, edge_rules, uniform_rules
from jaxlab.quantizers.numerics.affine import AffineParams, AffineQuantizer, fake_quantize


@golden('qwt', 'uniform_percentile')
def test_percentile_quantizer_and_gradient_agree_with_reference(vectors):
  axes = {'tensor_act': None, 'channel_act': -1, 'linear_weight': 0, 'conv_weight': 0}
  with jax.enable_x64(True):
    for name, axis in axes.items():
      x = jnp.asarray(vectors[f'in_{name}'])
      upstream = vectors[f'in_upstream_{name}']
      granularity = 'tensor' if axis is None else 'channel'
      quantizer = AffineQuantizer(
        rule='asymmetric', granularity=granularity, axis=-1 if axis is None else axis
      )
      shape = [1] * x.ndim
      if axis is not None:
        shape[axis] = -1

      @jax.jit
      def forward(x, bits, quantizer=quantizer, shape=shape, upstream=upstream):
        constants = affine_constants(quantizer, x, bits)

        def quantized(x):
          wide = {k: c.reshape(shape) if c.ndim else c for k, c in constants.items()}
          y = fake_quantize(quantizer, x, AffineParams(**wide))
          return jnp.sum(y * upstream), y

        gradient, y = jax.grad(quantized, has_aux=True)(x)
        return constants, y, gradient

      for bits in vectors.param('bits'):
        constants, y, gradient = forward(x, bits)
        assert_close(constants['scale'], vectors[f'out_delta_{name}_b{bits}'], 1e-9)
        assert_close(constants['zero_point'], vectors[f'out_zero_point_{name}_b{bits}'], 1e-9)
        assert_close(y, vectors[f'out_dequant_{name}_b{bits}'], 1e-9)
        assert_close(gradient, vectors[f'grad_{name}_b{bits}'], 1e-9)


class Net(nn.Module):
  """Convolution, norm, convolution, dense layer; an attention-like softmax."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(4, (3, 3), name='conv1')(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, name='bn1')(x))
    x = nn.relu(nn.Conv(6, (3, 3), strides=2, name='conv2')(x))
    x = jnp.mean(x, (1, 2))
    x = x * HookPoint(name='softmax')(nn.softmax(x))
    return nn.Dense(3, name='fc')(x)


NET = Net()
X = random_images((8, 6, 6, 3))
VARIABLES = random_variables(NET, X)
RULES = edge_rules(4, 4)


def constants_of(quantized):
  return traverse_util.flatten_dict(quantized.variables['quantization'], sep='/')


@pytest.fixture(scope='module')
def quantized():
  return percentile_ptq(NET, VARIABLES, X, RULES)


def test_edges_are_those_of_every_network_and_of_an_anatomy():
  networks = [
    ResNet((1,), num_classes=2),
    models.WideResNet((1,), (4,), num_classes=2),
    models.MobileNetV2((1,), num_classes=2),
    models.ViT(num_classes=2, distilled=True),
    models.Swin(num_classes=2),
    models.GPT2(),
    models.Llama(),
    models.MLP(num_classes=2),
  ]
  edges = {path for model in networks for path in models.anatomy(model).edges}
  assert set(EDGES.split('|')) == edges
  encoder = models.Encoder(ResNet((1,)), models.MLPHead((4, 2)))
  rules = edge_rules(4, 3, edges=models.anatomy(encoder))
  bits = lambda rules, path: [decide(rules, path, own).bits for own in ('kernel', 'input')]  # noqa: E731
  for path in ('backbone/conv1', 'projector/fc0', 'projector/fc1'):
    assert bits(rules, path) == [8, 8]
  assert bits(rules, 'backbone/layer1_0/conv1') == [4, 3]
  kernels_alone = edge_rules(4, None, edges=models.anatomy(encoder))
  assert {rule.operand for rule in kernels_alone} == {'kernel'}
  assert decide(kernels_alone, 'projector/fc0', 'kernel').bits == 8
  tied = models.anatomy(models.GPT2())
  assert edge_rules(4, 3, edges=tied) == edge_rules(4, 3, edges=None) == uniform_rules(4, 3)
  assert bits(edge_rules(4, 3, edges=tied, edge_bits=6), 'lm_head') == [4, 3]


def test_kernels_have_codes_per_output_channel_and_norms_stay(quantized):
  kernel = quantized.variables['params']['conv2']['kernel']
  for channel in range(kernel.shape[-1]):
    assert len(np.unique(kernel[..., channel])) <= 16
  assert len(np.unique(kernel)) > 16
  kept = {name: quantized.variables['params'][name] for name in ('bn1',)}
  jax.tree.map(np.testing.assert_array_equal, kept, {'bn1': VARIABLES['params']['bn1']})
  jax.tree.map(
    np.testing.assert_array_equal, quantized.variables['batch_stats'], VARIABLES['batch_stats']
  )
  assert quantized.float_variables.tree == {**VARIABLES, 'quantization': {}}


def test_ranges_are_found_on_quantized_inputs_in_order_of_execution(quantized):
  seen = inputs_of(*quantized.unbind())
  constants = constants_of(quantized)
  for path, bits in (('conv1', 8), ('conv2', 4), ('fc', 8)):
    expected = affine_constants(TENSOR, seen[path], bits)
    for name, value in expected.items():
      assert_close(constants[f'{path}/input/{name}'], value, 1e-5, atol=1e-6)
  assert set(quantized.variables['quantization']['softmax']['input']) == {'scale', 'bits'}
  float_range = affine_constants(TENSOR, inputs_of(VARIABLES, ())['fc'], 8)['scale']
  assert abs(float_range - constants['fc/input/scale']) > 1e-3 * float_range


def test_ranges_found_anew_are_those_of_a_calibration_and_others_stay(quantized):
  variables, _ = quantized.unbind()
  stale = jax.tree.map(lambda leaf: leaf, variables['quantization'])
  for path in ('conv2', 'softmax', 'fc'):
    stale[path]['input'] = {**stale[path]['input'], 'scale': stale[path]['input']['scale'] * 3}
  hooks = [*quantized.hooks, recalibration_hook(['conv2', 'softmax', 'bn1'])]
  run = jax.jit(lambda v: apply(NET, v, X, hooks=hooks, mutable=['quantization'])[1])
  new = run({**variables, 'quantization': stale})['quantization']
  assert jax.tree.structure(new) == jax.tree.structure(stale)
  for path in ('conv1', 'conv2', 'softmax'):
    for name, value in variables['quantization'][path]['input'].items():
      assert_close(new[path]['input'][name], value, 1e-5, atol=1e-6)
  assert new['fc']['input']['scale'] == stale['fc']['input']['scale']


def inputs_of(variables, hooks):
  """What reaches the layers, before their own quantizer and behind all those before."""

  def keep(site, x):
    site.write('x', x)
    return x

  hooks = [*hooks, Hook('conv1|conv2|fc', input=keep, collection='seen')]
  _, state = jax.jit(lambda v: apply(NET, v, X, hooks=hooks, mutable=['seen']))(variables)
  return {path: own['x'] for path, own in state['seen'].items()}


def test_input_bits_of_convolutions_can_be_set_apart():
  constants = constants_of(percentile_ptq(NET, VARIABLES, X, RULES, conv_act_bits=8))
  assert constants['conv2/input/high'] == 255
  assert constants['softmax/input/bits'] == 4
  assert constants['conv2/kernel/high'] == 15


def test_eight_bits_are_near_the_float_network():
  new = percentile_ptq(NET, VARIABLES, X, edge_rules(8, 8))
  run = jax.jit(lambda network: network(X))
  expected = run(new.in_float())
  assert_close(expected, jax.jit(NET.apply)(VARIABLES, X), 1e-6)
  assert_close(run(new), expected, 0.05)


def test_nothing_is_quantized_without_rules():
  new = percentile_ptq(NET, VARIABLES, X, ())
  plain = jax.jit(lambda variables, x: apply(NET, variables, x))  # compiled, as the other is
  np.testing.assert_array_equal(call(new, X), plain(VARIABLES, X))


@pytest.mark.parametrize('value', [0.3, -2.0, 0.0])
def test_constants_are_kept_as_they_are(value):
  x = jnp.full((7, 3), 0.1) * jnp.array([1.0, 30.0, 0.0])
  assert np.all(affine_constants(operands.CHANNEL, x, 4, 'mark')['scale'] == 0)
  own = affine_constants(operands.CHANNEL, x, 4)
  assert np.all(own['scale'] > 0) and own['scale'][2] == 1
  np.testing.assert_allclose(operands.fake_quantize_operand(x, own), x, rtol=1e-6)
  flat = jnp.full((7, 3), value)
  wrapped = nn.Sequential([nn.Dense(2)])
  variables = random_variables(wrapped, flat)
  new = percentile_ptq(wrapped, variables, flat, [Rule('layers_0', 'input', 4)])
  np.testing.assert_allclose(call(new, flat), apply(wrapped, variables, flat), rtol=1e-6)
  if value:
    np.testing.assert_allclose(
      constants_of(new)['layers_0/input/scale'], abs(value) / 15, rtol=1e-6
    )
    assert not new.skipped
  else:  # nothing is known of other values: they stay in float, which is said
    assert constants_of(new)['layers_0/input/scale'] == 0
    assert dict(new.skipped) == {'layers_0': 'the range of its input has no extent'}


def test_networks_with_unhashable_fields_are_quantized():
  model = ResNet(stage_sizes=[1], width=4, stem='cifar', num_classes=3)
  variables = random_variables(model, X)
  rules = [*uniform_rules(4), Rule('layer1_0/conv.', 'input', 4)]
  new = percentile_ptq(model, variables, X, rules, train=False)
  assert set(new.variables['quantization']['layer1_0']['conv1']) == {'input', 'kernel'}
  y = jax.jit(lambda network: network(X))(new)
  assert np.all(np.isfinite(y))


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: percentile_ptq(NET, VARIABLES, X, edge_rules(4, 16)), "'conv2' must lie.*got 16"),
    (lambda: percentile_ptq(NET, VARIABLES, X, RULES, conv_act_bits=1), 'conv_act_bits.*got 1'),
    (
      lambda: percentile_ptq(NET, VARIABLES, X, edge_rules(4, 4, edges='head')),
      "kernel rule 'head'",
    ),
    (lambda: percentile_ptq(NET, VARIABLES, X * np.nan, RULES), "input of 'conv1' is not finite"),
    (
      lambda: apply(NET, VARIABLES, X, hooks=operands.operand_hooks()),
      "no collection 'quantization', so nothing would be quantized",
    ),
  ],
)
def test_bad_input_is_named(make, match):
  with pytest.raises(ValueError, match=match):
    make()
