import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from flax import traverse_util
from golden_vectors import assert_close
from models.random_variables import call

from jaxlab import quantizers
from jaxlab.quantizers import Rule, find_layers, uniform_rules
from jaxlab.quantizers.networks import layers
from jaxlab.quantizers.networks.execution import integer_network

RNG = np.random.default_rng(0)


def stretched(variables):
  """Every kernel with another size for each index of each axis: a shared scale would show."""
  flat = traverse_util.flatten_dict(variables['params'], sep='/')
  for path, leaf in flat.items():
    if path.endswith('kernel'):
      kernel = RNG.normal(size=leaf.shape)
      for axis, size in enumerate(leaf.shape):
        shape = [1] * leaf.ndim
        shape[axis] = size
        kernel = kernel * np.exp(RNG.normal(size=size) / 2).reshape(shape)
      flat[path] = jnp.asarray(kernel, jnp.float32)
  return {**variables, 'params': traverse_util.unflatten_dict(flat, sep='/')}


def half_range(kernel, inputs, bits):
  """Float64: one symmetric range for all that lies along the axes `inputs`."""
  kernel = np.asarray(kernel, np.float64)
  scale = np.abs(kernel).max(inputs, keepdims=True) / ((2**bits - 1) / 2) * (1 - 2.0**-21)
  return np.clip(np.round(kernel / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, x):
    class Block(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        y = nn.DenseGeneral((2, 3), use_bias=False, name='split')(nn.LayerNorm(name='norm')(x))
        return x + nn.DenseGeneral(6, (-2, -1), name='join')(y), None

    over = {'variable_axes': {'params': 0}, 'split_rngs': {'params': True}, 'length': 4}
    return nn.scan(Block, **over)(name='layers')(x, None)[0]


class Experts(nn.Module):
  axis: int = 0

  @nn.compact
  def __call__(self, x):
    over = {'in_axes': None, 'out_axes': 0, 'axis_size': 3, 'split_rngs': {'params': True}}
    dense = nn.vmap(nn.Dense, variable_axes={'params': self.axis}, **over)
    return dense(5, name='experts')(x).sum(0)


def one(module):
  return nn.Sequential([module])


DENSE, LINE, IMAGE = (4, 6), (2, 9, 4), (2, 6, 6, 4)
# The model, the shape of its input, and for each kernel the axes of what one output is a sum over.
CASES = {
  'dense': (one(nn.Dense(5)), DENSE, {'layers_0': (0,)}),
  'heads': (one(nn.DenseGeneral((2, 3))), DENSE, {'layers_0': (0,)}),
  'heads without bias': (one(nn.DenseGeneral((2, 3), use_bias=False)), DENSE, {'layers_0': (0,)}),
  'out of heads': (one(nn.DenseGeneral(5, axis=(-2, -1))), LINE, {'layers_0': (0, 1)}),
  'batch dimensions': (one(nn.DenseGeneral(5, batch_dims=0)), DENSE, {'layers_0': (1,)}),
  'attention': (
    nn.MultiHeadDotProductAttention(2),
    LINE,
    {'query': (0,), 'key': (0,), 'value': (0,), 'out': (0, 1)},
  ),
  'line': (one(nn.Conv(6, (3,))), LINE, {'layers_0': (0, 1)}),
  'line without bias': (one(nn.Conv(6, (3,), use_bias=False)), LINE, {'layers_0': (0, 1)}),
  'depthwise': (one(nn.Conv(8, (3, 3), feature_group_count=4)), IMAGE, {'layers_0': (0, 1, 2)}),
  'transposed': (one(nn.ConvTranspose(4, (3, 3))), IMAGE, {'layers_0': (0, 1, 2)}),
  'transposed kernel': (
    one(nn.ConvTranspose(4, (3, 3), transpose_kernel=True)),
    IMAGE,
    {'layers_0': (0, 1, 3)},
  ),
  'local': (one(nn.ConvLocal(3, (2, 2))), IMAGE, {'layers_0': (0, 1, 2)}),
  'einsum': (one(nn.Einsum((6, 2, 3), 'bi,ihd->bhd', use_bias=False)), DENSE, {'layers_0': (0,)}),
  'scan': (Scanned(), DENSE, {'layers/split': (1,), 'layers/join': (1, 2)}),
  'experts': (Experts(), DENSE, {'experts': (1,)}),
  'experts along the second axis': (Experts(1), DENSE, {'experts': (0,)}),
  'remat': (one(nn.remat(nn.Dense)(5)), DENSE, {'layers_0': (0,)}),
}


# Each way in which kernels lie, once.
WAYS = (
  'out of heads',
  'attention',
  'transposed kernel',
  'scan',
  'experts',
)


@pytest.fixture(scope='module', params=tables.few(CASES, *WAYS))
def case(request):
  model, shape, inputs = CASES[request.param]
  x = jnp.asarray(RNG.normal(size=shape), jnp.float32)
  return model, stretched(jax.jit(model.init)(jax.random.key(0), x)), x, inputs


def test_ptq_has_a_scale_for_each_output_of_each_head_expert_and_layer(case):
  model, variables, x, inputs = case
  network = quantizers.ptq(model, variables, x, uniform_rules(4))
  found = traverse_util.flatten_dict(network.variables['params'], sep='/')
  constants = traverse_util.flatten_dict(network.variables['quantization'], sep='/')
  floats = traverse_util.flatten_dict(variables['params'], sep='/')
  assert set(network.layers) == set(inputs) and not network.skipped
  for path, axes in inputs.items():
    kernel = floats[f'{path}/kernel']
    assert_close(found[f'{path}/kernel'], half_range(kernel, axes, 4), 1e-5)
    scale = constants[f'{path}/kernel/scale']
    codes = np.asarray(found[f'{path}/kernel'], np.float64) / scale
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
    assert scale.size == kernel.size // np.prod([kernel.shape[axis] for axis in axes])
  assert np.all(np.isfinite(call(network, x)))


def test_the_percentile_search_has_the_same_channels_or_names_the_stack(case):
  model, variables, x, inputs = case
  if any(layer.stacked for layer in find_layers(model, variables, x).values()):
    with pytest.raises(ValueError, match=f'{next(iter(inputs))}.* are stacked'):
      quantizers.percentile_ptq(model, variables, x, uniform_rules(4))
    return
  network = quantizers.percentile_ptq(model, variables, x, uniform_rules(4))
  found = traverse_util.flatten_dict(network.variables['params'], sep='/')
  floats = traverse_util.flatten_dict(variables['params'], sep='/')
  for path, axes in inputs.items():
    kernel = np.asarray(floats[f'{path}/kernel'])
    outputs = [axis for axis in range(kernel.ndim) if axis not in axes]
    matrix = np.transpose(kernel, [*axes, *outputs]).reshape(
      -1, 1, *[kernel.shape[i] for i in outputs]
    )
    columns = matrix.reshape(len(matrix), -1)
    expected, _ = quantizers.quantize_kernels({'fc': {'kernel': jnp.asarray(columns)}}, {'fc': 4})
    expected = np.asarray(expected['fc']['kernel']).reshape(
      [kernel.shape[i] for i in [*axes, *outputs]]
    )
    expected = np.transpose(expected, np.argsort([*axes, *outputs]))
    assert_close(found[f'{path}/kernel'], expected, 1e-5)


@pytest.mark.parametrize('bits', tables.few([8, 4], 8))
def test_integers_run_what_they_can_and_say_the_rest_before(case, bits):
  model, variables, x, inputs = case
  known = find_layers(model, variables, x)
  if any(layer.stacked for layer in known.values()):
    return
  network = quantizers.percentile_ptq(model, variables, x, uniform_rules(bits, bits))
  reasons = {path: layer.in_float for path, layer in known.items() if layer.in_float}
  if len(reasons) == len(inputs):
    with pytest.raises(ValueError, match=r'No layer can be run in integers:\n  layers_0: .+'):
      integer_network(network)
    return
  integers = integer_network(network)
  assert dict(integers.skipped) == reasons == {}
  assert not [
    path
    for path in traverse_util.flatten_dict(integers.variables['params'])
    if path[-1] == 'kernel'
  ]
  assert_close(call(integers, x), call(network, x), 1e-4)


@pytest.mark.parametrize('granularity', tables.first(['channel', 'tensor']))
def test_largest_magnitudes_are_those_of_the_channels(granularity):
  model, x = one(nn.DenseGeneral((2, 3))), jnp.asarray(RNG.normal(size=DENSE), jnp.float32)
  variables = stretched(model.init(jax.random.key(0), x))
  rules = [Rule('.*', 'kernel', 8, granularity), *uniform_rules(inputs=8)]
  network = quantizers.absmax_ptq(model, variables, x, rules)
  kernel = np.asarray(variables['params']['layers_0']['kernel'], np.float64)
  scale = np.abs(kernel).max(0 if granularity == 'channel' else None) / 127
  found = network.variables['params']['layers_0']['kernel']
  assert_close(found, np.round(kernel / scale) * scale, 1e-4)
  integers = integer_network(network)
  assert not integers.skipped
  assert_close(integers(x), network(x), 1e-4)


class Heads(nn.Module):
  """To heads, and back."""

  @nn.compact
  def __call__(self, x):
    return nn.DenseGeneral(5, (-2, -1), name='back')(nn.relu(nn.DenseGeneral((2, 3), name='to')(x)))


class OneBlock(nn.Module):
  @nn.compact
  def __call__(self, x):
    return Heads(name='block')(x)


@pytest.mark.exhaustive
def test_gptq_kernels_of_heads_are_run_in_integers():
  model, x = OneBlock(), jnp.asarray(RNG.normal(size=(16, 6)), jnp.float32)
  variables = stretched(jax.jit(model.init)(jax.random.key(0), x))
  network = quantizers.gptq_ptq(model, variables, x, uniform_rules(8, 8), blocks='block')
  integers = integer_network(network)
  assert not integers.skipped
  assert_close(call(integers, x), call(network, x), 1e-4)


def test_trained_steps_are_those_of_the_channels(case):
  model, variables, x, inputs = case
  rules = uniform_rules(4, learned=True)
  if any(layer.stacked for layer in find_layers(model, variables, x).values()):
    with pytest.raises(ValueError, match='are stacked'):
      quantizers.lsq(model, variables, x, rules)
    return
  network = quantizers.lsq(model, variables, x, rules)
  steps = traverse_util.flatten_dict(network.variables['lsq'], sep='/')
  floats = traverse_util.flatten_dict(variables['params'], sep='/')
  for path, axes in inputs.items():
    kernel = np.abs(np.asarray(floats[f'{path}/kernel'], np.float64))
    expected = 2 * kernel.mean(axes, keepdims=True) / np.sqrt(7)
    np.testing.assert_allclose(steps[f'{path}/kernel'], expected, rtol=1e-5)
  assert np.all(np.isfinite(call(network, x)))


PADDED = {
  'circular line': (nn.Conv(6, (3,), strides=2, padding='CIRCULAR'), LINE),
  'causal': (nn.Conv(6, (3,), kernel_dilation=2, padding='CAUSAL'), LINE),
  'groups of a line': (nn.Conv(6, (3,), feature_group_count=2), LINE),
  'circular': (nn.Conv(6, (3, 2), padding='CIRCULAR', kernel_dilation=(1, 2)), IMAGE),
  'reflected': (nn.Conv(6, (3, 3), padding='REFLECT', strides=(1, 2)), IMAGE),
  'dilated input': (nn.Conv(6, (3, 3), input_dilation=(2, 1), padding=[(1, 2), (0, 1)]), IMAGE),
  'volume': (nn.Conv(5, (2, 3, 2), strides=(1, 2, 1)), (2, 4, 5, 4, 3)),
  'second axis': (nn.DenseGeneral((2, 3), axis=1), LINE),
}


@pytest.mark.parametrize('name', tables.few(PADDED, 'circular line', 'reflected'))
def test_integers_pad_as_the_module_does(name):
  layer, shape = PADDED[name]
  x = jnp.asarray(RNG.normal(size=shape), jnp.float32)
  model = one(layer)
  variables = stretched(jax.jit(model.init)(jax.random.key(0), x))
  network = quantizers.percentile_ptq(model, variables, x, uniform_rules(4, 8))
  integers = integer_network(network)
  assert not integers.skipped
  assert_close(call(integers, x), call(network, x), 1e-5)


class Own(nn.Module):
  """A product of its own, whose kernel's axes only its author knows."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', nn.initializers.normal(), (2, x.shape[-1], 3))
    return jnp.einsum('bi,kio->bko', x, kernel)


class Widened(nn.Dense):
  """A Dense layer that does more than nn.Dense."""

  @nn.compact
  def __call__(self, x):
    return 2 * super().__call__(x)


def test_axes_of_unknown_modules_are_asked_for():
  model, x = one(Own()), jnp.asarray(RNG.normal(size=DENSE), jnp.float32)
  variables = stretched(model.init(jax.random.key(0), x))
  for method in (quantizers.ptq, quantizers.percentile_ptq):
    with pytest.raises(
      ValueError, match=r"'layers_0' is a Own with a kernel \(2, 6, 3\): .*axes=\(-1,\)"
    ):
      method(model, variables, x, uniform_rules(4))
    own = [Rule('layers_0', 'kernel', 4, axes=(0, 2))]
    kernel = method(model, variables, x, own).variables['params']['layers_0']['kernel']
    codes = [len(np.unique(kernel[k, :, o])) for k in range(2) for o in range(3)]
    assert max(codes) <= 6 and len(np.unique(kernel)) > 16
  with pytest.raises(ValueError, match='gptq_ptq takes no axes= of rules'):
    quantizers.gptq_ptq(model, variables, x, own, blocks='layers_0')
  with pytest.raises(ValueError, match=r'axes=\(3,\) of the rule for .* are not those of a kernel'):
    quantizers.percentile_ptq(model, variables, x, [Rule('layers_0', 'kernel', 4, axes=(3,))])
  with pytest.raises(ValueError, match=r'axes of the rule for .* are whole numbers, of a kernel'):
    Rule('layers_0', 'input', 4, axes=(-1,))
  network = quantizers.ptq(model, variables, x, own)
  expected = half_range(variables['params']['layers_0']['kernel'], (1,), 4)
  assert_close(network.variables['params']['layers_0']['kernel'], expected, 1e-5)


def test_a_layer_with_a_call_of_its_own_stays_in_float():
  model, x = one(Widened(3)), jnp.asarray(RNG.normal(size=DENSE), jnp.float32)
  network = quantizers.percentile_ptq(
    model, model.init(jax.random.key(0), x), x, uniform_rules(8, 8)
  )
  with pytest.raises(ValueError, match='layers_0: Widened has a call of its own'):
    integer_network(network)


TREES = {
  'line without bias': ({'conv': {'kernel': (3, 4, 8)}}, None),
  'line': ({'conv': {'kernel': (3, 4, 8), 'bias': (8,)}}, ('conv', (-1,))),
  'heads': ({'q': {'kernel': (6, 2, 4), 'bias': (2, 4)}}, ('q', (-2, -1))),
  'experts': ({'fc': {'kernel': (3, 6, 4), 'bias': (3, 4)}}, ('fc', (-3, -1))),
  'experts or heads': ({'fc': {'kernel': (3, 3, 4), 'bias': (3, 4)}}, None),
  'stack': (
    {'l': {'fc': {'kernel': (4, 4, 4)}, 'norm': {'scale': (4, 6)}}},
    ('l/fc', (-3, -1)),
  ),
  'transposed': ({'up': {'kernel': (2, 2, 4, 8), 'bias': (4,)}}, ('up', (-2,))),
  'image': ({'conv': {'kernel': (3, 3, 4, 8)}}, ('conv', (-1,))),
  'no window': ({'conv': {'kernel': (12, 64, 4, 8)}}, None),
}


@pytest.mark.parametrize('name', tables.some(TREES, 2))
def test_a_tree_tells_axes_or_is_refused(name):
  shapes, expected = TREES[name]
  params = jax.tree.map(
    lambda shape: jnp.asarray(RNG.normal(size=shape), jnp.float32),
    shapes,
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )
  if expected is None:
    with pytest.raises(ValueError, match='layers=find_layers'):
      quantizers.quantize_weights(params, uniform_rules(3))
    return
  path, channels = expected
  flat = traverse_util.flatten_dict(params, sep='/')
  kernel = flat[f'{path}/kernel']
  assert tuple(sorted(layers.tree_layer(flat, path).channels)) == channels
  found = traverse_util.flatten_dict(quantizers.quantize_weights(params, uniform_rules(3)), sep='/')
  inputs = tuple(axis for axis in range(kernel.ndim) if axis - kernel.ndim not in channels)
  assert_close(found[f'{path}/kernel'], half_range(kernel, inputs, 3), 1e-5)
