import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close, golden
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from models.random_variables import random_images as images
from models.random_variables import random_variables, run

from jaxlab.models import create, from_torch, module_paths
from jaxlab.models.wide_resnet import PreActivationBlock, WideResNet, conv_by_matmul

TINY = {'stage_sizes': (1, 2), 'widths': (4, 6), 'strides': (1, 2), 'stem_width': 3}


def stats_of(model, variables, x, train, key=None):
  """The running statistics after a pass, flat by path."""
  rngs = None if key is None else {'dropout': key}
  _, state = jax.jit(lambda v, x: model.apply(v, x, train, mutable=['batch_stats'], rngs=rngs))(
    variables, x
  )
  leaves = jax.tree_util.tree_leaves_with_path(state['batch_stats'])
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


@golden('acsr', 'wrn_basic_block')
@pytest.mark.parametrize('conv', ['direct', 'matmul'])
def test_block_agrees_with_reference(vectors, conv):
  x = jnp.asarray(vectors['in_images_nchw'].transpose(0, 2, 3, 1))
  out = vectors['out_nchw'].transpose(0, 2, 3, 1)
  options = {}
  if conv == 'matmul':
    options['conv'] = lambda *args, **kwargs: PreActivationBlock.conv(
      *args, conv_general_dilated=conv_by_matmul, **kwargs
    )
  block = PreActivationBlock(out.shape[-1], vectors.param('stride'), **options)
  shapes = jax.eval_shape(block.init, jax.random.key(0), x)
  state_dict = {name.replace('_', '.', 1): a for name, a in vectors.tree('param_').items()}
  del state_dict['stride']
  assert_close(run(block, from_torch(shapes, state_dict), x), out, 1e-5)


def test_wrn28_10_has_the_published_number_of_parameters():
  # 36.5 million, table 4 of Zagoruyko & Komodakis 2016.
  shapes = jax.eval_shape(create('wrn28_10').init, jax.random.key(0), images((1, 32, 32, 3)))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes['params'])) == 36_479_194
  assert create('wrn16_4').widths == (64, 128, 256) and create('wrn16_4').stage_sizes == (2, 2, 2)
  with pytest.raises(ValueError, match="no network is called 'wrn27_10'; closest: wrn28_10"):
    create('wrn27_10')


@pytest.mark.exhaustive
def test_a_network_may_end_with_its_last_block():
  model = create('cifar_preact_resnet18')
  shapes = jax.eval_shape(model.init, jax.random.key(0), images((1, 32, 32, 3)))
  # conv3x3 and four stages of two blocks, three 1x1 shortcuts, norms in front of convolutions, a classifier.
  widths = (64, 128, 256, 512)
  expected, before = 27 * 64 + 512 * 10 + 10, 64
  for width in widths:
    expected += 2 * before + 9 * before * width + 2 * width + 9 * width * width
    expected += before * width * (before != width) + 2 * (2 * width + 9 * width * width)
    before = width
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes['params'])) == expected
  assert model.stages[-1] == 'block4' and 'bn1' not in shapes['params']
  bare = WideResNet(**TINY, final_norm=False)
  x = images((2, 8, 8, 3))
  variables = jax.jit(bare.init)(jax.random.key(0), x)
  last = bare.apply(variables, x, stop=None)
  raw = WideResNet(**TINY)
  whole = jax.jit(raw.init)(jax.random.key(0), x)
  params = {**whole['params'], **variables['params']}
  before = raw.apply({**whole, 'params': params}, x, stop='bn1')
  assert_close(last, before.mean((1, 2)), 1e-5)


def test_stages_stride_and_features_are_the_last_width():
  model = WideResNet()
  shapes = {
    stage: jax.eval_shape(
      lambda x, stage=stage: model.init_with_output(jax.random.key(0), x, stop=stage)[0],
      images((2, 84, 84, 3)),
    ).shape
    for stage in model.stages[1:]
  }
  assert shapes == {
    'block1': (2, 84, 84, 16),
    'block2': (2, 84, 84, 160),
    'block3': (2, 42, 42, 320),
    'bn1': (2, 21, 21, 640),
  }


def test_modules_carry_the_names_of_the_torch_code():
  paths = module_paths(WideResNet(**TINY, num_classes=5), images())
  first = [*('bn1', 'relu1', 'convShortcut', 'conv1', 'bn2', 'relu2', 'dropout', 'conv2')]
  assert [p for p in paths if p.startswith('block1/layer_0/')] == [
    f'block1/layer_0/{name}' for name in first
  ]
  assert 'block2/layer_1/conv1' in paths and 'block2/layer_1/convShortcut' not in paths
  assert [p for p in paths if '/' not in p] == [
    'conv1', 'block1', 'block2', 'bn1', 'relu', 'avgpool', 'linear',
  ]  # fmt: skip


def test_shortcut_reads_the_preactivation_only_where_the_width_changes():
  x = images((1, 4, 4, 3))
  for features in (3, 5):
    block = PreActivationBlock(features)
    variables = random_variables(block, x)
    variables['params']['conv2']['kernel'] = np.zeros_like(variables['params']['conv2']['kernel'])
    y = run(block, variables, x)
    if features == 3:
      np.testing.assert_array_equal(y, x)
    else:
      variables['params']['bn1'] = {
        'scale': np.zeros(3, np.float32),
        'bias': -np.ones(3, np.float32),
      }
      np.testing.assert_array_equal(run(block, variables, x), 0)
      assert np.abs(y).max() > 0


def test_only_the_chosen_stages_use_batch_statistics():
  model = WideResNet(**TINY)
  x = images()
  variables = random_variables(model, x)
  before = stats_of(model, variables, x, False)
  for train, moved in (
    ({'block2', 'bn1'}, ('block2/', 'bn1/')),
    (('bn1',), ('bn1/',)),
    ((), ()),
    (True, ('block1/', 'block2/', 'bn1/')),
  ):
    after = stats_of(model, variables, x, train)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {path for path in before if moved and path.startswith(moved)}
  everything = run(model, variables, x, train=True)[0]
  names = model.apply(variables, x, model.stages, mutable=['batch_stats'])[0]
  assert_close(names, everything, 1e-6)


def test_dropout_is_active_in_the_chosen_stages_alone():
  model = WideResNet(**TINY, dropout=0.5)
  x = images()
  variables = random_variables(model, x)

  @jax.jit
  def features(key):
    rngs = {'dropout': key}
    frozen = model.apply(
      variables, x, {'block2'}, mutable=['batch_stats'], rngs=rngs, stop='block2'
    )
    return frozen[0], model.apply(variables, x, {'block2'}, mutable=['batch_stats'], rngs=rngs)[0]

  (frozen, dropped), (same, again) = features(jax.random.key(0)), features(jax.random.key(1))
  np.testing.assert_array_equal(frozen, same)
  assert np.abs(dropped - again).max() > 1e-3
  np.testing.assert_array_equal(run(model, variables, x), run(WideResNet(**TINY), variables, x))


def test_a_network_cut_in_two_is_the_network():
  model = WideResNet(**TINY, num_classes=5)
  x = images()
  variables = random_variables(model, x)
  whole = run(model, variables, x)
  for stage in model.stages:
    into = model.apply(variables, x, stop=stage)
    assert_close(model.apply(variables, into, start=stage), whole, 1e-6)


@pytest.mark.parametrize('fields', tables.first([{'conv': 'matmul'}, {'remat': True}]), ids=str)
def test_matrix_products_and_remat_give_the_same_values_and_gradients(fields):
  x = images()
  variables = random_variables(WideResNet(**TINY), x)

  def step(model):
    def loss(params, x):
      v = {**variables, 'params': params}
      y, state = model.apply(v, x, {'block2', 'bn1'}, mutable=['batch_stats'])
      return jnp.mean(jnp.sin(3 * y)), state

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables['params'], x)

  actual, expected = (step(WideResNet(**TINY, **options)) for options in (fields, {}))
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert_close(a, b, 1e-4, 1e-6)


@pytest.mark.parametrize('size, taps, stride', [((7, 6), 3, 2), ((8, 8), 3, 1), ((5, 8), 1, 2)])
def test_convolution_by_matmul_is_the_convolution(size, taps, stride):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, *size, 3)), jnp.float32)
  kernel = jnp.asarray(rng.standard_normal((taps, taps, 3, 4)), jnp.float32)
  padding = [(taps // 2, taps // 2)] * 2
  expected = jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  assert_close(conv_by_matmul(x, kernel, (stride, stride), padding), expected, 1e-6)
  many = jnp.stack([kernel, 2 * kernel])
  mapped = jax.vmap(lambda k: conv_by_matmul(x, k, (stride, stride), padding))(many)
  assert_close(mapped[1], 2 * expected, 1e-6)
  with pytest.raises(ValueError, match='groups and dilations'):
    conv_by_matmul(x, kernel, (1, 1), padding, feature_group_count=3)


def test_sharded_batch_gives_the_statistics_of_one_device():
  model = WideResNet(**TINY)
  x = images((16, 8, 8, 3))
  variables = random_variables(model, x)
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ('data', 'fsdp'))
  sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))))
  actual, expected = (run(model, variables, batch, train=True) for batch in (sharded, x))
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert_close(a, b, 1e-5, 1e-6)


def test_bfloat16_is_close_to_float32():
  x = images()
  high, low = (WideResNet(**TINY, num_classes=5, dtype=dtype) for dtype in (None, jnp.bfloat16))
  variables = random_variables(high, x)
  y = run(low, variables, x)
  assert y.dtype == jnp.bfloat16
  assert_close(y, run(high, variables, x), 0.05)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'widths': (4,)}, '2 stages need as many widths'),
    ({'strides': (1,)}, '2 stages need as many widths and strides'),
    ({'dropout': 1.0}, 'dropout=1.0'),
    ({'conv': 'fft'}, "conv='fft' is none of"),
    ({'num_classes': 0}, 'num_classes=0'),
  ],
)
def test_fields_out_of_range_raise(fields, message):
  with pytest.raises(ValueError, match=message):
    WideResNet(**{**TINY, **fields})


def test_wrong_stages_and_strides_are_refused():
  x = images()
  variables = random_variables(WideResNet(**TINY), x)
  for options in ({'train': {'block3'}}, {'start': 'block3'}, {'stop': 'block3'}):
    with pytest.raises(
      ValueError, match="'block3' is no stage; stages: conv1, block1, block2, bn1"
    ):
      WideResNet(**TINY).apply(variables, x, **options)
  model = WideResNet((1,), widths=(4,), strides=(2,), stem_width=4)
  with pytest.raises(ValueError, match='leave no convolution to stride 2'):
    jax.eval_shape(model.init, jax.random.key(0), x)
