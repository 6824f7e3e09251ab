import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close, golden
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from models.random_variables import random_images as images
from models.random_variables import random_variables, run, run_capture

from jaxlab.models import BasicBlock, ResNet, capture, create, from_torch, module_paths
from jaxlab.models.resnet import pad_shortcut

TINY = {'stage_sizes': (1, 1), 'width': 4, 'widths': (4, 8), 'stem': 'cifar'}


def abstract(model, shape):
  return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def train_step(model, variables, x):
  def loss(params):
    y, state = model.apply({**variables, 'params': params}, x, True, mutable=['batch_stats'])
    return jnp.mean(jnp.sin(3 * y)), (y, state)

  return jax.value_and_grad(loss, has_aux=True)(variables['params'])


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert_close(a, b, rtol, atol)


@golden('long_tail_protocols', 'cifar_resnet_block_option_a')
def test_basic_block_with_padded_shortcut_agrees_with_reference(vectors):
  x = jnp.asarray(vectors['in_images_nchw'].transpose(0, 2, 3, 1))
  out = vectors['out_nchw'].transpose(0, 2, 3, 1)
  block = BasicBlock(out.shape[-1], -(-x.shape[1] // out.shape[1]), shortcut='pad')
  state_dict = {name.replace('_', '.', 1): a for name, a in vectors.tree('param_').items()}
  variables = from_torch(abstract(block, x.shape), state_dict)
  assert_close(run(block, variables, x), out, 1e-5)


def test_padded_shortcut_subsamples_and_pads_channels_on_both_sides():
  x = images((2, 4, 4, 3))
  y = pad_shortcut(x, 8, 2)
  assert y.shape == (2, 2, 2, 8)
  np.testing.assert_array_equal(y[..., 2:5], x[:, ::2, ::2])
  np.testing.assert_array_equal(y[..., :2], 0)
  np.testing.assert_array_equal(y[..., 5:], 0)
  with pytest.raises(ValueError, match='from 3 channels down to 2'):
    pad_shortcut(x, 2, 2)


# torchvision's list; He et al. 2016 round those of the CIFAR networks to 0.27, 0.46, 0.85 and 1.7 million.
@pytest.mark.parametrize(
  'name, parameters',
  tables.some(
    [
      ('resnet18', 11_689_512),
      ('resnet34', 21_797_672),
      ('resnet50', 25_557_032),
      ('resnet101', 44_549_160),
      ('resnet152', 60_192_808),
      ('resnext50_32x4d', 25_028_904),
      ('resnext101_32x8d', 88_791_336),
      ('cifar_resnet20', 269_722),
      ('cifar_resnet32', 464_154),
      ('cifar_resnet56', 853_018),
      ('cifar_resnet110', 1_727_962),
      ('cifar_resnet18', 11_173_962),
    ],
    4,
  ),
)
def test_networks_have_the_published_number_of_parameters(name, parameters):
  model = create(name)
  tree = abstract(model, (1, 32, 32, 3))['params']
  assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == parameters


def test_modules_carry_torchs_names_and_hook_points():
  paths = module_paths(create('resnet50', stage_sizes=(1, 1)), images((1, 32, 32, 3)))
  branch = [f'{name}{i}' for i in (1, 2, 3) for name in ('conv', 'bn', 'relu')]
  block = [*branch[:-1], 'downsample_0', 'downsample_1', 'relu3']
  stages = [path for n in (1, 2) for path in (f'layer{n}_0', *(f'layer{n}_0/{m}' for m in block))]
  assert paths == ['conv1', 'bn1', 'relu', 'maxpool', *stages, 'avgpool', 'fc']
  paths = module_paths(ResNet(**TINY, strides=(1, 2)), images())
  assert 'layer1_0/relu2' in paths and 'layer2_0/downsample_1' in paths
  assert 'layer1_0/downsample_0' not in paths and 'fc' not in paths and 'maxpool' not in paths


@pytest.mark.parametrize(
  'options, shape, stages',
  [
    (
      {'stage_sizes': (1, 1, 1), 'width': 16, 'strides': (2, 2, 2), 'stem': 'cifar'},
      (2, 16, 16, 1),
      [8, 4, 2],
    ),
    ({**TINY, 'strides': (1, 2)}, (2, 8, 8, 3), [8, 4]),
    ({**TINY, 'stem': 'imagenet'}, (2, 33, 33, 3), [9, 5]),
    ({**TINY, 'block': 'bottleneck', 'cardinality': 4, 'base_width': 16}, (2, 8, 8, 3), [8, 4]),
  ],
)
def test_stages_have_the_expected_sizes(options, shape, stages):
  model = ResNet(**options)
  x = images(shape)
  names = [f'layer{i + 1}_0' for i in range(len(stages))]
  y, captured = jax.eval_shape(
    lambda x: capture(model, model.init(jax.random.key(0), x), names, x), x
  )
  assert [captured[name].shape[1] for name in names] == stages
  assert y.shape == (shape[0], captured[names[-1]].shape[-1])


def test_stride_two_pads_symmetrically():
  model = ResNet((1,), width=1, widths=(1,), strides=(2,), stem='cifar', shortcut='pad')
  x = np.zeros((1, 4, 4, 1), np.float32)
  x[0, 0, 0, 0] = 1
  variables = random_variables(model, x)
  kernel = np.zeros((3, 3, 1, 1), np.float32)
  kernel[1, 1] = 1
  variables['params']['conv1']['kernel'] = kernel
  variables['params']['layer1_0']['conv1']['kernel'] = kernel
  variables['params']['bn1'] = {'scale': jnp.ones(1), 'bias': jnp.zeros(1)}
  variables['batch_stats']['bn1'] = {'mean': jnp.zeros(1), 'var': jnp.ones(1)}
  _, captured = run_capture(model, variables, ['layer1_0/conv1'], x)
  # With padding 1 on all sides the window's center visits even rows and columns; 'SAME' would visit odd ones.
  assert float(captured['layer1_0/conv1'][0, 0, 0, 0]) > 0.9


@pytest.mark.parametrize('zero', [False, True])
def test_zero_init_residual_makes_blocks_start_as_shortcuts(zero):
  model = ResNet(**TINY, zero_init_residual=zero)
  params = jax.jit(model.init)(jax.random.key(0), images())['params']
  np.testing.assert_array_equal(params['layer1_0']['bn2']['scale'], 0.0 if zero else 1.0)
  np.testing.assert_array_equal(params['layer1_0']['bn1']['scale'], 1.0)


def test_convolutions_start_kaiming_normal_over_fan_out():
  model = ResNet((1,), width=32, widths=(96,), stem='cifar')
  kernel = jax.jit(model.init)(jax.random.key(0), images())['params']['layer1_0']['conv1']['kernel']
  assert kernel.shape == (3, 3, 32, 96)
  assert abs(float(kernel.std()) / np.sqrt(2 / (9 * 96)) - 1) < 0.02
  assert float(jnp.abs(kernel).max()) > 3 * float(kernel.std())  # not truncated


@pytest.mark.parametrize('block', tables.few(['basic', 'bottleneck'], 'basic'))
def test_remat_changes_nothing_but_memory(block):
  x = images()
  plain, remat = (ResNet(**TINY, block=block, num_classes=5, remat=r) for r in (False, True))
  variables = random_variables(plain, x)
  assert jax.tree.map(jnp.shape, random_variables(remat, x)) == jax.tree.map(jnp.shape, variables)
  actual = jax.jit(lambda v: train_step(remat, v, x))(variables)
  assert_trees_close(actual, jax.jit(lambda v: train_step(plain, v, x))(variables))


def test_train_step_on_eight_devices_equals_one():
  model = ResNet(**TINY, num_classes=5)
  x = images((16, 8, 8, 3))
  variables = random_variables(model, x)
  step = jax.jit(lambda v, x: train_step(model, v, x))
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ('data', 'fsdp'))
  sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))))
  assert_trees_close(step(variables, sharded), step(variables, x), 1e-4, 1e-5)


@pytest.mark.exhaustive
def test_jit_and_vmap_over_parameters_equal_eager():
  model = ResNet(**TINY, num_classes=5)
  x = images()
  own = [random_variables(model, x, seed=seed) for seed in range(3)]
  many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
  outputs = jax.jit(jax.vmap(lambda v: model.apply(v, x)))(many)
  for index in range(3):
    assert_close(outputs[index], model.apply(own[index], x), 1e-5)


@pytest.mark.exhaustive
def test_bfloat16_is_close_to_float32():
  x = images()
  high, low = ResNet(**TINY, num_classes=5), ResNet(**TINY, num_classes=5, dtype=jnp.bfloat16)
  variables = random_variables(high, x)
  y = run(low, variables, x)
  assert y.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(jax.jit(low.init)(jax.random.key(0), x))} == {
    jnp.dtype('float32')
  }
  assert_close(y, run(high, variables, x), 0.05)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'stem': 'tiny'}, "stem='tiny' is none of"),
    ({'shortcut': 'conv'}, "shortcut='conv' is none of"),
    ({'shortcut': 'average', 'strides': (1, 3)}, r'strides of 1 and 2, got \(1, 3\)'),
    ({'block': 'wide'}, "block='wide' is none of"),
    ({'stage_sizes': (1,) * 5}, '5 stages need as many widths and strides'),
    ({'widths': (4,)}, '2 stages need as many widths'),
    ({'num_classes': 0}, 'num_classes=0'),
  ],
)
def test_fields_out_of_range_raise(fields, message):
  with pytest.raises(ValueError, match=message):
    ResNet(**{'stage_sizes': (1, 1), **fields})


def test_bad_images_and_grouped_basic_blocks_raise():
  model = ResNet(**TINY)
  with pytest.raises(ValueError, match=r'batch, height, width, channels'):
    abstract(model, (8, 8, 3))
  with pytest.raises(ValueError, match='normalized floats; got uint8'):
    jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8, 8, 3), jnp.uint8))
  with pytest.raises(ValueError, match='cardinality needs the bottleneck'):
    abstract(ResNet(**TINY, cardinality=2), (1, 8, 8, 3))


@pytest.mark.parametrize(('activation', 'act'), [('relu', None), ('arctan', np.arctan)])
def test_without_a_stem_the_first_block_sees_the_image(activation, act):
  act = act or (lambda x: np.maximum(x, 0))
  model = ResNet(**{**TINY, 'stem': 'identity', 'num_classes': None, 'activation': activation})
  x = images((2, 6, 6, 3))
  variables = random_variables(model, x)
  assert {path.split('/')[0] for path in module_paths(model, x)} == {
    'layer1_0',
    'layer2_0',
    'avgpool',
  }
  out, found = run_capture(model, variables, ['layer1_0', 'layer2_0'], x)

  def conv(x, kernel, stride=1):
    pads = [(k // 2, k // 2) for k in kernel.shape[:2]]
    dims = ('NHWC', 'HWIO', 'NHWC')
    return np.asarray(
      jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=dims)
    )

  def block(x, path, stride):
    params, stats = variables['params'][path], variables['batch_stats'][path]

    def norm(y, name):
      own = {**params[name], **stats[name]}
      scale = np.asarray(own['scale']) / np.sqrt(np.asarray(own['var']) + 1e-5)
      return (y - own['mean']) * scale + own['bias']

    y = act(norm(conv(x, params['conv1']['kernel'], stride), 'bn1'))
    y = norm(conv(y, params['conv2']['kernel']), 'bn2')
    return act(y + norm(conv(x, params['downsample_0']['kernel'], stride), 'downsample_1'))

  first = block(x, 'layer1_0', 1)
  assert_close(found['layer1_0'], first, 1e-5)
  assert_close(found['layer2_0'], block(first, 'layer2_0', 2), 1e-5)
  assert_close(out, np.mean(found['layer2_0'], (1, 2)), 1e-5)


def test_an_unknown_activation_is_named():
  with pytest.raises(ValueError, match="activation='gelu' is none of"):
    ResNet(**TINY, activation='gelu')
