import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from models.random_variables import random_images as images
from models.random_variables import random_variables as init
from models.random_variables import run, run_capture

from jaxlab.models import abstract_variables, create, from_torch, module_paths, to_torch
from jaxlab.models.mobilenetv2 import (
  InvertedResidual,
  MobileNetV2,
  scale_channels,
)

TINY = {
  'stage_sizes': (1, 2),
  'widths': (8, 12),
  'strides': (1, 2),
  'expansion': 2,
  'stem_width': 8,
  'head_width': 16,
  'stem': 'cifar',
  'num_classes': 5,
}


# timm's networks of these names.
@pytest.mark.parametrize(
  'size, parameters',
  tables.some(
    [
      ('035', 1_677_128),
      ('050', 1_968_680),
      ('075', 2_636_424),
      ('100', 3_504_872),
      ('110d', 4_516_520),
      ('120d', 5_831_144),
      ('140', 6_108_776),
    ],
    4,
  ),
)
def test_networks_have_timms_number_of_parameters(size, parameters):
  tree = abstract_variables(create(f'mobilenetv2_{size}'), (32, 32, 3))['params']
  assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == parameters


def test_channels_round_half_up_and_lose_no_tenth():
  assert [scale_channels(16, m) for m in (0.25, 0.5, 0.75, 1.0, 1.25)] == [8, 8, 16, 16, 24]
  for channels in range(8, 400):
    for multiplier in (0.35, 0.75, 1.1, 1.4):
      scaled = scale_channels(channels, multiplier)
      assert scaled % 8 == 0 and scaled >= 0.9 * channels * multiplier
      assert scaled <= max(8, channels * multiplier + 8)


def test_modules_carry_timms_names_and_hook_points():
  first = ['conv_dw', 'bn1', 'relu1', 'conv_pw', 'bn2']
  rest = ['conv_pw', 'bn1', 'relu1', 'conv_dw', 'bn2', 'relu2', 'conv_pwl', 'bn3']
  blocks = [('blocks_0_0', first), ('blocks_1_0', rest), ('blocks_1_1', rest)]
  paths = module_paths(MobileNetV2(**TINY), images())
  assert paths == [
    *('conv_stem', 'bn1', 'relu1'),
    *(path for name, own in blocks for path in (name, *(f'{name}/{part}' for part in own))),
    *('conv_head', 'bn2', 'relu2', 'avgpool', 'classifier'),
  ]


def test_block_is_a_shortcut_around_clipped_and_linear_layers():
  x = 4 * images((2, 4, 4, 8))
  block = InvertedResidual(8, expansion=2)
  variables = init(block, x)
  names = ['relu1', 'bn1', 'relu2', 'bn2', 'bn3']
  y, captured = run_capture(block, variables, names, x)
  for i in (1, 2):
    assert_close(captured[f'relu{i}'], np.clip(captured[f'bn{i}'], 0, 6), 1e-6)
    assert captured[f'bn{i}'].max() > 6  # else the clipping is not seen
  assert_close(y, captured['bn3'] + x, 1e-6)
  for other in (InvertedResidual(8, 2, expansion=2), InvertedResidual(16, expansion=2)):
    y, captured = run_capture(other, init(other, x), ['bn3'], x)
    assert_close(y, captured['bn3'], 1e-6)


def test_depthwise_convolution_is_one_window_a_channel_padded_symmetrically():
  x = images((2, 6, 6, 8))
  block = InvertedResidual(8, stride=2, expansion=None)
  variables = init(block, x)
  kernel = variables['params']['conv_dw']['kernel']
  assert kernel.shape == (3, 3, 1, 8)
  _, captured = run_capture(block, variables, ['conv_dw'], x)
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  expected = sum(
    padded[:, r : r + 5 : 2, c : c + 5 : 2] * kernel[r, c] for r in range(3) for c in range(3)
  )
  assert_close(captured['conv_dw'], expected, 1e-5)


@pytest.mark.parametrize('stem, size', [('cifar', 4), ('imagenet', 2)])
def test_stem_sets_the_first_stride(stem, size):
  model = MobileNetV2(**{**TINY, 'stem': stem, 'num_classes': None})
  y, captured = run_capture(model, init(model, x := images()), ['relu2'], x)
  assert captured['relu2'].shape == (3, size, size, 16)
  assert_close(y, captured['relu2'].mean((1, 2)), 1e-6)


def test_names_round_trip_through_the_checkpoint():
  variables = init(MobileNetV2(**TINY), images())
  state_dict = to_torch(variables)
  assert state_dict['blocks.1.1.conv_dw.weight'].shape == (24, 1, 3, 3)
  assert state_dict['blocks.1.0.conv_pwl.weight'].shape == (12, 16, 1, 1)
  assert 'blocks.0.0.bn1.running_var' in state_dict and 'classifier.bias' in state_dict
  back = from_torch(variables, {**state_dict, 'bn1.num_batches_tracked': np.array(3)})
  jax.tree.map(np.testing.assert_array_equal, back, variables)


def train_step(model, variables, x):
  def loss(params):
    y, state = model.apply({**variables, 'params': params}, x, True, mutable=['batch_stats'])
    return jnp.mean(jnp.sin(3 * y)), (y, state)

  return jax.value_and_grad(loss, has_aux=True)(variables['params'])


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert_close(a, b, rtol, atol)


@pytest.fixture(scope='module')
def plain():
  x = images((16, 8, 8, 3))
  model = MobileNetV2(**TINY)
  variables = init(model, x)
  return x, variables, jax.jit(lambda v, x: train_step(model, v, x))(variables, x)


@pytest.mark.exhaustive
def test_training_normalizes_by_the_batch_and_moves_every_running_statistic(plain):
  x, variables, ((_, (logits, state)), gradient) = plain
  stats, old = state['batch_stats'], variables['batch_stats']
  assert jax.tree.structure(stats) == jax.tree.structure(old)
  for path, moved in jax.tree_util.tree_leaves_with_path(
    jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), stats, old)
  ):
    assert moved, jax.tree_util.keystr(path)
  stem = np.asarray(
    jax.jit(
      lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), [(1, 1)] * 2, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
      )
    )(x, variables['params']['conv_stem']['kernel'])
  )
  expected = 0.9 * old['bn1']['mean'] + 0.1 * stem.mean((0, 1, 2))
  assert_close(stats['bn1']['mean'], expected, 1e-5)
  expected = 0.9 * old['bn1']['var'] + 0.1 * stem.reshape(-1, 8).var(0, ddof=1)
  assert_close(stats['bn1']['var'], expected, 1e-5)
  evaluated = run(MobileNetV2(**TINY), variables, x)
  assert float(jnp.abs(logits - evaluated).max()) > 1e-3
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(leaf).all() and np.any(leaf != 0), jax.tree_util.keystr(path)


@pytest.mark.exhaustive
def test_remat_on_eight_devices_gives_the_plain_step_of_one(plain):
  x, variables, expected = plain
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ('data', 'fsdp'))
  x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))))
  step = jax.jit(lambda v, x: train_step(MobileNetV2(**TINY, remat=True), v, x))
  assert_trees_close(step(variables, x), expected, 1e-4, 1e-5)


def test_jit_and_vmap_over_parameters_equal_eager():
  x = images((2, 4, 4, 8))
  block = InvertedResidual(8, expansion=2)
  own = [init(block, x, seed=seed) for seed in range(2)]
  many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
  outputs = jax.jit(jax.vmap(lambda v: block.apply(v, x)))(many)
  assert_close(outputs[1], block.apply(own[1], x), 1e-5)


def test_bfloat16_is_close_to_float32():
  x = images()
  high, low = MobileNetV2(**TINY), MobileNetV2(**TINY, dtype=jnp.bfloat16)
  variables = init(high, x)
  y = run(low, variables, x)
  assert y.dtype == jnp.bfloat16
  assert_close(y, run(high, variables, x), 0.05)
  shapes = jax.eval_shape(low.init, jax.random.key(0), x)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}


def test_convolutions_start_kaiming_normal_over_the_window_of_a_group():
  block = InvertedResidual(64)
  params = jax.jit(block.init)(jax.random.key(0), images((1, 4, 4, 32)))['params']
  for name, variance in (('conv_pw', 2 / 192), ('conv_dw', 2 / 9), ('conv_pwl', 2 / 64)):
    assert abs(float(params[name]['kernel'].std()) / np.sqrt(variance) - 1) < 0.06
  model = MobileNetV2(stage_sizes=(), num_classes=10)
  params = jax.jit(model.init)(jax.random.key(0), images())['params']
  largest = float(jnp.abs(params['classifier']['kernel']).max())
  assert 0.99 / np.sqrt(10) < largest <= 1 / np.sqrt(10)
  np.testing.assert_array_equal(params['classifier']['bias'], 0)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'stem': 'tiny'}, "stem='tiny' is none of"),
    ({'stage_sizes': (1, 1, 1)}, '3 stages need as many widths and strides'),
    ({'strides': (1,)}, '2 stages need as many widths and strides'),
    ({'num_classes': 0}, 'num_classes=0'),
    ({'kernel_sizes': (3,)}, r'and kernel_sizes; got .*kernel_sizes=\(3,\)'),
    ({'activation': 'gelu'}, "activation='gelu' is none of"),
    ({'padding': 'VALID'}, "padding='VALID' is none of"),
  ],
)
def test_fields_out_of_range_raise(fields, message):
  with pytest.raises(ValueError, match=message):
    MobileNetV2(**{**TINY, **fields})


def test_integer_images_raise():
  with pytest.raises(ValueError, match='normalized floats; got uint8'):
    jax.eval_shape(MobileNetV2(**TINY).init, jax.random.key(0), jnp.ones((1, 8, 8, 3), jnp.uint8))
