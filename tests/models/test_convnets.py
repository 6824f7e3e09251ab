"""ConvNeXt, DenseNet and VGG: what the comparison with timm does not see; the plain small network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close, golden
from models.random_variables import random_images, random_variables, run, run_capture

from jaxlab.models import (
  VGG,
  BilinearCNN,
  ConvNet,
  ConvNeXt,
  DenseNet,
  bilinear_pool,
  from_torch,
  module_paths,
  to_torch,
)
from jaxlab.models.vgg import adaptive_average

CONVNEXT = {'depths': (1, 2), 'widths': (4, 8), 'layer_scale': 0.5, 'num_classes': 3}
DENSENET = {'block_sizes': (2, 1), 'growth': 4, 'stem_width': 6, 'num_classes': 3}
VGG_FIELDS = {'stage_sizes': (2, 1), 'widths': (4, 6), 'hidden': 8, 'num_classes': 3}
NETWORKS = {
  'convnext': ConvNeXt(**CONVNEXT),
  'densenet': DenseNet(**DENSENET),
  'vgg': VGG(**VGG_FIELDS),
  'vgg_bn': VGG(**VGG_FIELDS, batch_norm=True),
  'bilinear': BilinearCNN((2, 1), (4, 6), num_classes=3),
}
every = pytest.mark.parametrize('model', NETWORKS.values(), ids=NETWORKS)
IMAGES = random_images((4, 16, 16, 3))


@every
def test_names_round_trip_through_the_checkpoint(model):
  variables = random_variables(model, IMAGES)
  state_dict = to_torch(variables)
  back = from_torch(model, state_dict)
  assert jax.tree.structure(back) == jax.tree.structure(variables)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


def train_step(model, variables, x):
  def loss(params):
    own = {**variables, 'params': params}
    y, state = model.apply(own, x, True, mutable=['batch_stats'])
    return jnp.mean(jnp.sin(3 * y)), state

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])


@pytest.mark.parametrize('name', tables.few(NETWORKS, 'vgg_bn'))
def test_remat_changes_nothing_but_memory_and_all_parameters_have_gradients(name):
  model = NETWORKS[name]
  variables = random_variables(model, IMAGES)
  plain = train_step(model, variables, IMAGES)
  again = train_step(model.clone(remat=True), variables, IMAGES)
  jax.tree.map(lambda a, b: assert_close(a, b, 1e-4, 1e-5), again, plain)
  for path, leaf in jax.tree_util.tree_leaves_with_path(plain[1]):
    assert np.isfinite(leaf).all() and np.any(leaf != 0), jax.tree_util.keystr(path)


@pytest.mark.parametrize('name', tables.few(NETWORKS, 'densenet'))
def test_bfloat16_is_close_to_float32(name):
  model = NETWORKS[name]
  variables = random_variables(model, IMAGES)
  y = run(model.clone(dtype=jnp.bfloat16), variables, IMAGES)
  assert y.dtype == jnp.bfloat16
  assert_close(y, run(model, variables, IMAGES), 0.1)


def test_a_dense_layer_appends_its_channels():
  model = NETWORKS['densenet']
  names = ['pool0', 'denseblock1/denselayer1', 'denseblock1/denselayer1/conv2']
  _, captured = run_capture(model, random_variables(model, IMAGES), names, IMAGES)
  before, after, new = (captured[name] for name in names)
  np.testing.assert_array_equal(after, np.concatenate([before, new], -1))


def test_drop_path_drops_whole_branches():
  model = ConvNeXt(**CONVNEXT, drop_path=0.99)
  variables = random_variables(model, IMAGES)

  @jax.jit
  def train(seed):
    return model.apply(variables, IMAGES, True, rngs={'drop_path': jax.random.key(seed)})

  kept = run(model, variables, IMAGES)
  outputs = np.stack([train(seed) for seed in range(4)])
  assert (np.abs(outputs - kept).max((1, 2)) > 1e-3).all()
  # With both later blocks dropped, which is the rule, what remains is the first.
  short = ConvNeXt(**{**CONVNEXT, 'depths': (1, 0)})
  params = {**variables['params'], 'stages_1': {}}
  params['stages_1'] = {'downsample': variables['params']['stages_1']['downsample']}
  expected = run(short, {'params': params}, IMAGES)
  differences = np.abs(outputs - expected).max(-1).ravel()
  assert (differences < 1e-4).any()


def test_adaptive_averages_are_those_over_pytorchs_windows():
  x = random_images((2, 3, 5, 2))
  y = np.asarray(adaptive_average(x, 7, 5))
  for i in range(7):
    low, high = int(np.floor(i * 3 / 7)), int(np.ceil((i + 1) * 3 / 7))
    assert_close(y[:, i], x[:, low:high].mean(1), 1e-6)
  y = np.asarray(adaptive_average(x, 2, 2))
  rows, columns = [(0, 2), (1, 3)], [(0, 3), (2, 5)]
  for i, (a, b) in enumerate(rows):
    for j, (c, d) in enumerate(columns):
      assert_close(y[:, i, j], x[:, a:b, c:d].mean((1, 2)), 1e-6)


def test_without_hidden_layers_features_are_means_of_the_last_map():
  model = VGG((1, 1), (4, 6), batch_norm=True, hidden=None)
  variables = random_variables(model, IMAGES)
  features, captured = run_capture(model, variables, ['blocks_1_0'], IMAGES)
  maps = np.asarray(captured['blocks_1_0'], np.float64)
  batch, height, width, channels = maps.shape
  pooled = maps.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))
  assert_close(features, pooled.mean((1, 2)), 1e-6)
  assert 'pre_logits' not in variables['params']


@golden('peer_learning', 'bilinear_pool')
def test_bilinear_pooling_and_its_gradient_agree_with_official_code(vectors):
  x = np.moveaxis(vectors['in_features_nchw'], 1, -1)
  y, back = jax.vjp(bilinear_pool, jnp.asarray(x, jnp.float32))
  assert_close(y, vectors['out_pooled'], 2e-6)
  (gradient,) = back(jnp.asarray(vectors['in_cotangent'], jnp.float32))
  assert_close(np.moveaxis(gradient, -1, 1), vectors['grad_features_nchw'], 1e-5)


def test_dead_channels_have_finite_correlations_and_gradients():
  x = jnp.zeros((1, 2, 2, 3)).at[..., 0].set(1.0)
  y, back = jax.jit(lambda x: jax.vjp(bilinear_pool, x))(x)
  expected = np.sqrt(np.full(9, 1e-5) + np.eye(9)[0])
  assert_close(y[0], expected / np.linalg.norm(expected), 1e-6)
  # d y_1 / d x of channel 1 is that of sqrt(mean of x_0 x_1 + eps) at 0.
  (gradient,) = back(jnp.zeros((1, 9)).at[0, 1].set(1.0))
  slope = 0.5 / np.sqrt(1e-5) / 4 / np.linalg.norm(expected)
  assert_close(gradient[0, ..., 1], np.full((2, 2), slope), 1e-4)
  negative = jax.jit(bilinear_pool)(-jnp.ones((1, 1, 1, 2)).at[..., 0].set(-1.0))
  assert np.isfinite(negative).all()


def test_a_bilinear_network_classifies_the_map_in_front_of_the_last_pooling():
  model = BilinearCNN((1, 1), (4, 6), num_classes=3)
  vgg = VGG((1, 1), (4, 6), hidden=None, num_classes=None)
  variables = random_variables(model, IMAGES)
  features = {name: tree for name, tree in variables['params'].items() if name != 'fc'}
  _, captured = run_capture(vgg, {'params': features}, ['blocks_1_0'], IMAGES)
  pooled = np.asarray(bilinear_pool(captured['blocks_1_0']), np.float64)
  fc = variables['params']['fc']
  assert_close(run(model, variables, IMAGES), pooled @ fc['kernel'] + fc['bias'], 1e-5)
  drawn = jax.jit(model.init)(jax.random.key(0), IMAGES)['params']['fc']
  assert not np.any(drawn['bias'])
  assert abs(np.std(drawn['kernel']) / np.sqrt(2 / 36) - 1) < 0.2


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: bilinear_pool(jnp.ones((2, 3))), r'\[batch, height, width, channels\]'),
    (lambda: bilinear_pool(jnp.ones((1, 2, 2, 3), int)), 'x must be floats'),
    (lambda: bilinear_pool(-jnp.ones((1, 2, 2, 3))), 'down to -1: it belongs behind a ReLU'),
    (lambda: bilinear_pool(jnp.ones((1, 2, 2, 3)), 0.0), 'eps must be positive'),
    (lambda: BilinearCNN(hidden=8), 'hidden=8'),
    (lambda: ConvNeXt(**{**CONVNEXT, 'widths': (4,)}), '2 stages need as many widths'),
    (lambda: ConvNeXt(**CONVNEXT, kernel_size=4), 'kernel_size=4 is even'),
    (lambda: ConvNeXt(**CONVNEXT, drop_path=1.0), r'drop_path=1.0 is not in \[0, 1\)'),
    (lambda: ConvNeXt(num_classes=0), 'num_classes=0; give None'),
    (lambda: DenseNet(num_classes=0), 'num_classes=0; give None'),
    (lambda: VGG(num_classes=0), 'num_classes=0; give None'),
    (lambda: VGG(**{**VGG_FIELDS, 'widths': (4,)}), 'need as many widths'),
    (lambda: VGG(**{**VGG_FIELDS, 'stage_sizes': (0, 1)}), 'of at least one convolution'),
  ],
)
def test_fields_out_of_range_raise(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize(
  'model, smallest',
  [(ConvNeXt(), 32), (DenseNet(), 29), (VGG(), 32), (NETWORKS['densenet'], 5)],
)
def test_the_smallest_images_are_told(model, smallest):
  def shape(side):
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], x).shape

  assert shape(smallest)[0] == 1
  with pytest.raises(ValueError, match=f'leave nothing.*; give at least {smallest}'):
    shape(smallest - 1)


def test_the_plain_network_is_convolutions_norms_relus_and_pools_then_linear_layers():
  model = ConvNet((3, 4), input_pool=2, pools=(2, 1), hidden=(6,), num_classes=5)
  x = random_images((2, 8, 8, 2))
  variables = random_variables(model, x)
  params, stats = variables['params'], variables['batch_stats']
  y = x.reshape(2, 4, 2, 4, 2, 2).mean((2, 4))
  for i in range(2):
    kernel, padded = params[f'conv{i}']['kernel'], np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = range(y.shape[1])
    y = np.stack(
      [
        [np.einsum('bhwc,hwcd->bd', padded[:, r : r + 3, c : c + 3], kernel) for c in rows]
        for r in rows
      ]
    ).transpose(2, 0, 1, 3)
    mean, var = stats[f'bn{i}']['mean'], stats[f'bn{i}']['var']
    y = (y + params[f'conv{i}']['bias'] - mean) / np.sqrt(var + 1e-5)
    y = np.maximum(y * params[f'bn{i}']['scale'] + params[f'bn{i}']['bias'], 0)
    if i == 0:
      y = y.reshape(2, 2, 2, 2, 2, 3).max((2, 4))
  y = np.maximum(y.reshape(2, -1) @ params['fc0']['kernel'] + params['fc0']['bias'], 0)
  assert_close(run(model.clone(num_classes=None), variables, x), y, 1e-4)
  y = y @ params['fc']['kernel'] + params['fc']['bias']
  assert_close(run(model, variables, x), y, 1e-4)
  first = ['pool', 'conv0', 'bn0', 'map0', 'pool0']
  assert module_paths(model, x) == [*first, 'conv1', 'bn1', 'map1', 'pool1', 'fc0', 'relu0', 'fc']


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'widths': ()}, 'must be positive'),
    ({'hidden': (0,)}, 'must be positive'),
    ({'pools': (2,)}, r'pools=\(2,\) for 2 convolutions'),
    ({'input_pool': 8}, 'nothing is left of images of 16 x 16 pixels; give at least 32'),
  ],
)
def test_a_plain_network_that_cannot_be_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(ConvNet(**fields).init, jax.random.key(0), IMAGES)
