import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from flax import traverse_util
from golden_vectors import assert_close
from jax import export
from models.random_variables import random_images, random_variables

from jaxlab import models
from jaxlab.models import Hook, ViT, apply
from jaxlab.models.vit import Block
from jaxlab.quantizers.networks import execution, storage
from jaxlab.quantizers.networks.execution import integer_network
from jaxlab.quantizers.networks.operands import operand_hooks
from jaxlab.quantizers.networks.percentile import percentile_ptq
from jaxlab.quantizers.networks.quantized import Quantized
from jaxlab.quantizers.networks.repq import repq
from jaxlab.quantizers.networks.rules import edge_rules, uniform_rules

VIT = ViT(patch_size=4, image_size=8, width=12, depth=2, num_heads=2, num_classes=5)
RESNET = models.create('cifar_resnet18', stage_sizes=(1, 1), strides=(1, 2), width=6, num_classes=5)
X = random_images((8, 8, 8, 3))
PTQ = {'vit': (VIT, repq), 'resnet': (RESNET, percentile_ptq)}


def quantize(name, bits, dtype=np.float32) -> tuple[Quantized, jax.Array]:
  model, ptq = PTQ[name]
  variables = jax.tree.map(lambda leaf: leaf.astype(dtype), random_variables(model, X))
  x = jnp.asarray(X, dtype)
  return ptq(model, variables, x, edge_rules(bits, bits)), x


run = jax.jit(lambda network, x: network(x))


def with_whole_zero_points(quantized):
  """The fake-quantized network with the zero points that integers have."""
  flat = traverse_util.flatten_dict(quantized.variables['quantization'], sep='/')
  fractional = 0
  for path, value in flat.items():
    if path.endswith('input/zero_point'):
      fractional += int(np.any(value != np.round(value)))
      flat[path] = jnp.round(value)
  tree = traverse_util.unflatten_dict(flat, sep='/')
  return quantized.update(quantization=tree), fractional


@pytest.fixture(scope='module', params=tables.few(['vit', 'resnet'], 'resnet'))
def network(request):
  """Fake-quantized network and its integers, at 4 bits (the edges at 8)."""
  quantized, _ = quantize(request.param, 4)
  return quantized, integer_network(quantized)


@pytest.mark.parametrize('bits', tables.first([4, 8]))
@pytest.mark.parametrize('name', tables.few(PTQ, 'resnet'))
def test_integers_compute_the_fake_quantized_network(name, bits):
  # In float64 no value comes near enough to a rounding tie to fall to the other side.
  with jax.enable_x64(True):
    quantized, x = quantize(name, bits, np.float64)
    whole, fractional = with_whole_zero_points(quantized)
    network = integer_network(quantized)
    y = run(network, x)
    assert_close(y, run(whole, x), 1e-9)
    assert fractional == (2 * VIT.depth if name == 'vit' else 0)
    if fractional:
      fake = run(quantized, x)
      exact = run(quantized.in_float(), x)
      assert np.std(y - fake) > 0 and np.std(y - exact) < 1.3 * np.std(fake - exact)
  assert not network.skipped


@pytest.mark.exhaustive
def test_float32_integers_stay_within_the_error_of_quantization(network):
  quantized, integers = network
  whole, _ = with_whole_zero_points(quantized)
  fake, exact = run(whole, X), run(quantized.in_float(), X)
  y = run(integers, X)
  assert y.dtype == jnp.float32
  assert np.std(y - fake) < 0.2 * np.std(fake - exact)


def test_float_kernels_are_gone_and_given_back_by_their_codes(network):
  quantized, integers = network
  flat = traverse_util.flatten_dict(integers.variables['params'], sep='/')
  assert not [path for path in flat if path.endswith('kernel')]
  kernels = {
    path: leaf
    for path, leaf in traverse_util.flatten_dict(integers.variables['integers'], sep='/').items()
    if path.endswith('kernel')
  }
  fake = traverse_util.flatten_dict(quantized.variables['params'], sep='/')
  assert set(kernels) == set(fake) - set(flat)
  edges = ('conv1/kernel', 'fc/kernel', 'patch_embed/proj/kernel', 'head/kernel')
  for path, kernel in kernels.items():
    np.testing.assert_array_equal(kernel.dequantize(), fake[path])
    assert kernel.codes.dtype == jnp.uint8
    inputs, size = fake[path].shape[-2], fake[path].size
    packed = size if path in edges else size // inputs * -(-inputs // 2)
    assert kernel.codes.nbytes == packed


def test_files_give_the_same_network_back(network, tmp_path):
  _, integers = network
  path = tmp_path / 'network.safetensors'
  size = execution.save_integer_network(path, integers)
  loaded = execution.load_integer_network(path, integers.model)
  assert size == path.stat().st_size
  assert storage.size_in_bytes(loaded.variables) == storage.size_in_bytes(integers.variables)
  own, expected = (traverse_util.flatten_dict(n.unbind()[0], sep='/') for n in (loaded, integers))
  assert set(own) == set(expected)
  for name, leaf in expected.items():
    for a, b in zip(jax.tree.leaves(own[name]), jax.tree.leaves(leaf), strict=True):
      assert a.dtype == b.dtype
      np.testing.assert_array_equal(a, b)
  assert loaded.skipped == integers.skipped
  np.testing.assert_array_equal(run(loaded, X), run(integers, X))


def test_exported_programs_run_without_the_model(network):
  _, integers = network
  batch = export.symbolic_shape('batch')[0]
  shape = jax.ShapeDtypeStruct((batch, *X.shape[1:]), jnp.float32)
  exported = execution.export_network(integers, shape)
  kernels = [leaf for leaf in jax.tree.leaves(integers.variables['integers']) if leaf.ndim > 1]
  # A CPU sums the same integers in float32, exactly; an accelerator multiplies integers.
  for platform, count in (('cpu', 0), ('tpu', len(kernels))):
    program = execution.export_network(integers, shape, platforms=[platform])
    text = program.mlir_module()
    dots = re.findall(r'stablehlo\.(?:dot_general|convolution)\b.*-> tensor<.*?xi32>', text)
    assert len(dots) == count
  again = export.deserialize(exported.serialize())
  expected = run(integers, X)
  np.testing.assert_allclose(again.call(X), expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(again.call(X[:3]), expected[:3], rtol=1e-5, atol=1e-5)


class Pair(nn.Module):
  """Two layers, the second without bias."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, use_bias=False, name='second')(nn.relu(nn.Dense(32, name='first')(x)))


def pair(bits=4, dtype=np.float32):
  model, x = Pair(), np.random.default_rng(1).normal(size=(64, 16)).astype(np.float32)
  variables = jax.tree.map(lambda leaf: leaf.astype(dtype), random_variables(model, x))
  quantized = percentile_ptq(model, variables, x, uniform_rules(bits, 8))
  return model, variables, x.astype(dtype), quantized


def test_bytes_are_those_counted_by_hand():
  _, variables, _, quantized = pair()
  assert storage.size_in_bytes(variables) == 4 * (16 * 32 + 32 + 32 * 4)
  network = integer_network(quantized)
  codes = (16 * 32 + 32 * 4) // 2
  channels = (4 + 4) * (32 + 4)  # scale and zero point
  inputs = 2 * (4 + 4 + 1 + 1)
  assert storage.size_in_bytes(network.variables) == codes + channels + inputs + 4 * 32
  wide = integer_network(pair(8)[-1])
  assert storage.size_in_bytes(wide.variables) == 2 * codes + channels + inputs + 4 * 32
  assert set(network.variables['params']) == {'first'}


def test_bfloat16_networks_stay_bfloat16():
  _, _, x, quantized = pair(4, jnp.bfloat16)
  fake, y = run(quantized, x), run(integer_network(quantized), x)
  assert y.dtype == fake.dtype == jnp.bfloat16
  assert np.std(y.astype(np.float32) - fake.astype(np.float32)) < 0.03 * np.std(
    fake.astype(np.float32)
  )


@pytest.mark.exhaustive
def test_blocks_run_alone_under_one_compilation():
  quantized, _ = quantize('vit', 4)
  network = integer_network(quantized)
  block, seen = Block(VIT.num_heads), 'seen'
  traces = []

  @jax.jit
  def run_block(variables, x):
    traces.append(None)
    return apply(block, variables, x, hooks=network.hooks)

  def keep(site, x):
    site.write('input', x)
    return x

  hooks = [*network.hooks, Hook(r'blocks_\d+|norm', input=keep, collection=seen)]
  variables, _ = network.unbind()
  _, state = jax.jit(lambda v: apply(VIT, v, X, hooks=hooks, mutable=[seen]))(variables)
  x = state[seen]['blocks_0']['input']
  for index in range(VIT.depth):
    own = {name: tree.get(f'blocks_{index}', {}) for name, tree in variables.items()}
    x = run_block(own, x)
  assert_close(x, state[seen]['norm']['input'], 1e-5)
  assert len(traces) == 1


def test_hooks_of_a_compensation_stay():
  _, _, x, quantized = pair()
  shift = Hook('second', output=lambda site, y: y + 3)
  more = dataclasses.replace(quantized, hooks=(*quantized.hooks, shift))
  expected = run(integer_network(quantized), x) + 3
  np.testing.assert_array_equal(run(integer_network(more), x), expected)


class Odd(nn.Module):
  """One convolution and its options, over images in front of which there may be more axes."""

  options: tuple = ()

  @nn.compact
  def __call__(self, x):
    return nn.Conv(8, (3, 3), name='conv', **dict(self.options))(x)


@pytest.mark.parametrize(
  'options',
  [
    {'feature_group_count': 2, 'strides': 2, 'padding': 1},
    {'kernel_dilation': (1, 2), 'padding': 'VALID', 'use_bias': False},
    {'strides': (2, 1), 'padding': [(2, 0), (1, 1)]},
  ],
)
def test_convolutions_take_the_options_of_their_module(options):
  x = np.random.default_rng(0).normal(size=(2, 3, 9, 8, 4)).astype(np.float32)
  model = Odd(tuple(options.items()))
  variables = random_variables(model, x)
  quantized = percentile_ptq(model, variables, x, uniform_rules(4, 8))
  y = run(integer_network(quantized), x)
  assert_close(y, run(quantized, x), 1e-5)


def constants(low=0.0, high=255.0, scale=0.1, zero_point=7.0):
  names = ('scale', 'zero_point', 'low', 'high')
  return dict(zip(names, map(jnp.float32, (scale, zero_point, low, high))))


def layer(kernel, model=None, **input_constants):
  """A network of one layer `fc`, its constants made by hand; the layer itself, if it is given."""
  channels = {**constants(), 'scale': jnp.full(kernel.shape[-1], 0.1)}
  own = {'kernel': channels, 'input': constants(**input_constants)}
  variables = {'params': {'fc': {'kernel': kernel}}, 'quantization': {'fc': own}}
  if isinstance(model, nn.Dense | nn.Conv):
    variables = {name: tree['fc'] for name, tree in variables.items()}
  return Quantized(model, variables, {}, operand_hooks())


def test_constant_channels_keep_their_value():
  model, variables, x, _ = pair()
  variables['params']['first']['kernel'][:, 3] = -1.7
  quantized = percentile_ptq(model, variables, x, uniform_rules(8, 8))
  codes = quantized.variables['quantization']['first']['kernel']
  np.testing.assert_allclose(codes['scale'][3] * 255, 1.7, rtol=1e-6)
  own = quantized.variables['params']['first']['kernel']
  np.testing.assert_allclose(own[:, 3], -1.7, rtol=1e-6)
  assert_close(run(integer_network(quantized), x), run(quantized, x), 0.01)
  kernel = integer_network(quantized).variables['integers']['first']['kernel']
  np.testing.assert_array_equal(
    kernel.dequantize(), quantized.variables['params']['first']['kernel']
  )


@pytest.mark.parametrize('zero_point', [-40, 300, 7])
@pytest.mark.parametrize('high', [15.0, 255.0])
def test_zero_points_outside_of_the_codes(zero_point, high):
  rng = np.random.default_rng(0)
  kernel = jnp.asarray(rng.integers(-7, 200, (3, 3, 2, 4)) * np.float32(0.1))
  conv, dense = nn.Conv(4, (3, 3), use_bias=False), nn.Dense(4, use_bias=False)
  for model, own in ((conv, kernel), (dense, kernel[0, 0])):
    quantized = layer(own, model, zero_point=zero_point, high=high)
    x = jnp.asarray(rng.uniform(-40, 40, (2, 5, 5, 2)), jnp.float32)
    if own.ndim > 2 and max(high, zero_point) - min(0, zero_point) > 255:
      with pytest.raises(ValueError, match=r'takes .* codes, more than 8 bits'):
        integer_network(quantized)
    else:
      y = run(integer_network(quantized), x)
      assert_close(y, run(quantized, x), 1e-5)


def test_a_fractional_zero_point_moves_the_clipping_bounds_alone():
  kernel = 0.1 * jnp.eye(4, dtype=jnp.float32)
  quantized = layer(kernel, nn.Dense(4, use_bias=False), zero_point=7.4, high=15.0)
  x = jnp.linspace(-1.5, 1.5, 400).reshape(100, 4)
  y, fake = run(integer_network(quantized), x), run(quantized, x)
  codes = np.round(np.asarray(x) / np.float32(0.1)) + 7.4
  inside = (codes >= 0) & (codes <= 15)
  steps = (y - fake) / 0.01
  np.testing.assert_allclose(steps[inside], 0, atol=1e-4)
  np.testing.assert_allclose(steps[~inside], 0.4, atol=1e-4)


def test_layers_without_integers_say_why():
  kernel = jnp.ones((4, 2))
  fc, hooks = layer(kernel).unbind()
  reasons = {}
  for name, change in {
    'flat': {'input': constants(scale=0.0)},
    'wide': {'input': constants(zero_point=2.0**27)},
    'logarithmic': {'input': {'scale': jnp.ones(()), 'bits': jnp.float32(4)}},
    'channels': {'input': {**constants(), 'scale': jnp.ones(4)}},
    'weights': {'input': {}},
    'inputs': {'kernel': {}},
  }.items():
    fc['params'][name] = fc['params']['fc']
    fc['quantization'][name] = {**fc['quantization']['fc'], **change}
  reasons = integer_network(Quantized(None, fc, {}, hooks)).skipped
  assert dict(reasons) == {
    'flat': 'the range of its input has no extent',
    'wide': 'its int32 accumulator could overflow',
    'logarithmic': 'its input has no affine quantizer a tensor',
    'channels': 'its input has no affine quantizer a tensor',
    'weights': 'its input is not quantized',
    'inputs': 'its kernel is not quantized',
  }


class Transposed(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.ConvTranspose(2, (3, 3), name='fc')(x)


class Masked(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Conv(2, (3,), mask=jnp.ones((3, 2, 2)), name='fc')(x)


def run_by_hand(model, kernel, x):
  return integer_network(layer(kernel, model))(x)


def load_plain(path):
  storage.save_quantized(path, {'params': {'a': jnp.ones(3)}})
  return execution.load_integer_network(path, Pair())


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (
      lambda _: integer_network({'params': {}}),
      'integer_network takes a Quantized, .* got dict',
    ),
    (
      lambda _: integer_network(layer(jnp.ones((33100, 1)))),
      r'No layer can be run in integers:\n  fc: its int32 accumulator could overflow',
    ),
    (
      lambda _: apply(
        Pair(), pair()[-1].unbind()[0], np.ones((2, 16)), hooks=execution.integer_hooks()
      ),
      "no collection 'integers': call what `integer_network` returns",
    ),
    (
      lambda _: run_by_hand(Masked(), jnp.ones((3, 2, 2)), jnp.ones((1, 4, 2))),
      "'fc' .Conv. has no integer form: it has a mask. Give its kernel no bits",
    ),
    (
      lambda _: run_by_hand(Transposed(), jnp.ones((3, 3, 2, 2)), jnp.ones((1, 3, 3, 2))),
      "'fc' .ConvTranspose. has no integer form: only nn.Dense, nn.DenseGeneral and nn.Conv",
    ),
    (lambda path: load_plain(path / 'a.safetensors'), "holds no 'integers'"),
    (lambda path: execution.save_integer_network(path / 'a', pair()[-1]), 'not in integers'),
  ],
)
def test_bad_input_is_named(make, match, tmp_path):
  with pytest.raises(ValueError, match=match):
    make(tmp_path)
