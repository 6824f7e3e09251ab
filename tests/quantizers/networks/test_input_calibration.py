import compilations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn

from jaxlab.models import create
from jaxlab.quantizers import edge_rules
from jaxlab.quantizers.networks import calibration, kernels, operands
from jaxlab.quantizers.networks.calibration import calibrate_inputs

X = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))


class Twice(nn.Module):
  """The same block called twice: there is no way to cut it into blocks."""

  @nn.compact
  def __call__(self, x):
    block = nn.Dense(3, name='blocks_0')
    return nn.Dense(2, name='head')(block(nn.relu(block(x))))


class Skip(nn.Module):
  """Layers between blocks, and one behind them that reads an output from long before."""

  layers: type = tuple

  @nn.compact
  def __call__(self, x):
    first = nn.Dense(6, name='stem')(x)
    y = nn.Sequential(self.layers([nn.Dense(6), nn.relu]), name='blocks_0')(first)
    y = nn.Dense(6, name='between')(nn.tanh(y))
    y = nn.Sequential(self.layers([nn.Dense(6), nn.relu]), name='blocks_1')(y)
    return nn.Dense(2, name='head')(jnp.concatenate([y, nn.relu(first)], -1))


MODELS = {
  'vit': create(
    'vit_tiny_patch16_224', patch_size=4, image_size=16, width=16, depth=3, num_heads=2
  ),
  'resnet': create('resnet18', num_classes=5),
  'twice': Twice(),
  'skip': Skip(),
  'unhashable': Skip(layers=list),
}


@pytest.mark.parametrize('name', tables.few(MODELS, 'twice'))
def test_ranges_found_block_by_block_are_those_of_one_program(name):
  model = MODELS[name]
  variables = jax.jit(model.init)(jax.random.key(1), X)
  todo = operands.plan(model, variables, X, edge_rules(4, 4, edges=None), 'repq')
  found = calibrate_inputs(model, variables, X, todo)
  whole = jax.jit(lambda v, x: calibrate_inputs(model, v, x, todo))(variables, X)
  assert list(found) == [path for path, _ in todo.kinds]
  for path, constants in found.items():
    assert constants.keys() == whole[path].keys()
    for leaf, expected in zip(constants.values(), whole[path].values()):
      np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6)


def test_blocks_of_a_kind_and_bit_widths_share_one_compilation():
  model = MODELS['vit']
  variables = jax.jit(model.init)(jax.random.key(1), X)
  calibration._inside.clear_cache()
  with compilations.counted() as count:
    for bits in (3, 4):
      todo = operands.plan(model, variables, X, edge_rules(bits, bits), 'repq')
      calibrate_inputs(model, variables, X, todo)
  assert count['_inside'] == 1


@pytest.mark.exhaustive
def test_kernels_searched_together_are_those_searched_alone():
  rng = np.random.default_rng(0)
  shapes = {'a': (3, 3, 1, 8), 'b': (20, 5), 'c': (1, 1, 60, 4), 'd': (300, 7), 'e': (9, 2)}
  params = {
    name: {'kernel': jnp.asarray(rng.normal(size=shape), jnp.float32)}
    for name, shape in shapes.items()
  }
  params['e']['kernel'] = params['e']['kernel'].at[:, 1].set(0.25)  # a constant channel
  bits = {'a': 2, 'b': 4, 'c': 8, 'd': 3, 'e': 4}
  new, constants = kernels.quantize_kernels(params, bits)
  assert list(constants) == list(bits)
  for name, width in bits.items():
    kernel = params[name]['kernel']
    expected = operands.affine_constants(operands.CHANNEL, kernel, width)
    for key, leaf in expected.items():
      assert constants[name][key].shape == leaf.shape
      np.testing.assert_allclose(constants[name][key], leaf, rtol=1e-6)
    again = operands.fake_quantize_operand(kernel, constants[name])
    np.testing.assert_allclose(new[name]['kernel'], again, rtol=1e-6)


def test_a_broken_kernel_among_others_is_named():
  params = {name: {'kernel': jnp.ones((3, 2)).at[0].set(2.0)} for name in 'abc'}
  params['b']['kernel'] = params['b']['kernel'].at[1, 1].set(jnp.inf)
  _, constants = kernels.quantize_kernels(params, dict.fromkeys('abc', 4))
  with pytest.raises(ValueError, match="kernel of 'b' is not finite"):
    operands.check_finite({}, constants)
