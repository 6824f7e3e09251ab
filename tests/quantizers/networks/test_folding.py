import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from flax import traverse_util
from golden_vectors import assert_close, golden

from jaxlab import models
from jaxlab.models import Anatomy, Norm
from jaxlab.models.normalization import BatchNorm
from jaxlab.quantizers import find_layers
from jaxlab.quantizers.networks import folding


@golden('quantisers', 'bn_fold')
@pytest.mark.parametrize('x64', [True, False])
def test_folded_convolution_agrees_with_reference(vectors, x64):
  rtol = 1e-9 if x64 else 1e-5
  with jax.enable_x64(x64):
    v = {name: jnp.asarray(a, jnp.float64 if x64 else jnp.float32) for name, a in vectors.items()}
    kernel, bias = folding.fold_batch_norm(
      v['in_weight'].transpose(2, 3, 1, 0),
      v.get('in_bias'),
      v['in_bn_scale'],
      v['in_bn_bias'],
      v['in_bn_mean'],
      v['in_bn_var'],
      vectors.param('eps'),
    )
    assert_close(kernel.transpose(3, 2, 0, 1), vectors['out_weight'], rtol)
    assert_close(bias, vectors['out_bias'], rtol)
    # 3x3, stride 1, padding 1: the reference's convolution.
    numbers = ('NCHW', 'HWIO', 'NCHW')
    y = jax.lax.conv_general_dilated(v['in_x'], kernel, (1, 1), [(1, 1)] * 2, None, None, numbers)
    assert_close(y + bias[:, None, None], vectors['out_y'], rtol)


def randomized(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.uniform(0.5, 1.5, x.shape).astype(np.float32), tree)


def test_a_folded_resnet_keeps_tree_and_output():
  model = models.create('resnet18', width=8, num_classes=5, stage_sizes=(1, 1), strides=(1, 2))
  x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  variables = jax.jit(model.init)(jax.random.key(1), x)
  stats = randomized(variables['batch_stats'], 2)
  params = jax.tree.map(lambda p: p, variables['params'])
  for i, name in enumerate(('bn1', 'layer1_0', 'layer2_0')):
    norms = params if name == 'bn1' else params[name]
    for norm in [k for k in norms if k.startswith('bn') or k == 'downsample_1']:
      norms[norm] = randomized(norms[norm], 10 + i)
  folded, folded_stats = folding.fold_batch_norms(params, stats, models.anatomy(model))
  assert jax.tree.structure(folded) == jax.tree.structure(params)
  assert jax.tree.map(jnp.shape, folded_stats) == jax.tree.map(jnp.shape, stats)
  forward = jax.jit(model.apply)
  expected = forward({'params': params, 'batch_stats': stats}, x)
  actual = forward({'params': folded, 'batch_stats': folded_stats}, x)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * float(abs(expected).max()))
  for path, value in traverse_util.flatten_dict(folded_stats, sep='/').items():
    constant = 0 if path.endswith('mean') else np.float32(1 - 1e-5)
    np.testing.assert_array_equal(value, np.full(value.shape, constant, np.float32))
    assert constant == 0 or np.float32(value[0]) + np.float32(1e-5) == 1
  assert np.array_equal(folded['fc']['kernel'], params['fc']['kernel'])
  assert not np.allclose(folded['conv1']['kernel'], params['conv1']['kernel'])


@pytest.mark.parametrize(
  'model',
  [
    models.MobileNetV2((1, 2), (8, 8), (1, 1), 2, 8, 8, num_classes=3),
    models.WideResNet((1, 1), (4, 8), (1, 2), 4, num_classes=3),
    models.Encoder(
      models.ResNet((1,), 'bottleneck', 4, num_classes=None),
      models.MLPHead((4, 3), last_norm='plain'),
    ),
  ],
  ids=['mobilenet', 'wide', 'encoder'],
)
def test_every_batch_norm_behind_a_layer_is_folded(model):
  x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  variables = randomized(jax.jit(model.init)(jax.random.key(1), x), 2)
  anatomy = models.anatomy(model)
  folded, stats = folding.fold_batch_norms(variables['params'], variables['batch_stats'], anatomy)
  forward = jax.jit(model.apply)
  expected = forward(variables, x)
  actual = forward({'params': folded, 'batch_stats': stats}, x)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * float(abs(expected).max()))
  variances = traverse_util.flatten_dict(stats, sep='/')
  for norm in anatomy.norms:
    assert np.all(variances[f'{norm.path}/var'] == np.float32(1 - 1e-5)) == bool(norm.layer)


class Linear(nn.Module):
  """A dense layer, with or without bias, and a norm with or without offset."""

  use_bias: bool
  affine: bool

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, use_bias=self.use_bias, name='fc')(x)
    return BatchNorm(use_scale=self.affine, use_bias=self.affine, name='norm')(x, False)


@pytest.mark.parametrize('use_bias', [True, False])
@pytest.mark.parametrize('affine', [True, False])
def test_linear_maps_fold_with_whatever_parameters_they_have(use_bias, affine):
  model = Linear(use_bias, affine)
  x = jax.random.normal(jax.random.key(0), (6, 3))
  variables = randomized(jax.jit(model.init)(jax.random.key(1), x), 2)
  folded, stats = folding.fold_batch_norms(
    variables['params'], variables['batch_stats'], [('fc', 'norm')]
  )
  actual = model.apply({'params': folded, 'batch_stats': stats}, x)
  np.testing.assert_allclose(actual, model.apply(variables, x), rtol=1e-5, atol=1e-6)
  if not affine:
    assert 'norm' not in folded


def test_bfloat16_kernels_are_folded_in_float32():
  kernel = jax.random.normal(jax.random.key(0), (3, 4), jnp.bfloat16)
  ones = jnp.ones(4)
  folded, bias = folding.fold_batch_norm(kernel, None, 3 * ones, ones, ones, ones)
  assert folded.dtype == bias.dtype == jnp.bfloat16
  expected, _ = folding.fold_batch_norm(
    kernel.astype(jnp.float32), None, 3 * ones, ones, ones, ones
  )
  np.testing.assert_array_equal(folded, expected.astype(jnp.bfloat16))


class Up(nn.Module):
  """A convolution and a transposed one, each with a norm, all of equally many channels."""

  transpose_kernel: bool
  width: int = 4

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3), name='conv1')(x)
    x = nn.relu(BatchNorm(name='bn1')(x, False))
    options = {'strides': (2, 2), 'transpose_kernel': self.transpose_kernel}
    x = nn.ConvTranspose(self.width, (3, 3), name='conv2', **options)(x)
    return BatchNorm(name='bn2')(x, False)


@pytest.mark.parametrize(('width', 'transpose_kernel'), tables.cells([4, 5], [True, False], 2))
def test_transposed_convolutions_are_folded_on_the_axis_of_their_outputs(transpose_kernel, width):
  model = Up(transpose_kernel, width)
  x = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))
  variables = randomized(jax.jit(model.init)(jax.random.key(1), x), 2)
  expected = model.apply(variables, x)
  trees, pairs = (variables['params'], variables['batch_stats']), [(r'conv(\d)', r'bn\1')]
  axis = -2 if transpose_kernel else -1
  told = Anatomy(norms=[Norm('bn1', 'conv1', axis=-1), Norm('bn2', 'conv2', axis=axis)])
  for args, options in (
    (pairs, {'layers': find_layers(model, variables, x)}),
    (told, {}),
    (Anatomy(norms=[Norm('bn2', 'conv2')]), {'layers': find_layers(model, variables, x)}),
  ):
    params, stats = folding.fold_batch_norms(*trees, args, **options)
    actual = model.apply({'params': params, 'batch_stats': stats}, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert np.all(stats['bn2']['mean'] == 0)
  untold = [('conv2', 'bn2')], Anatomy(norms=[Norm('bn2', 'conv2')])
  for args in untold:
    if width == 4:
      with pytest.raises(ValueError, match=r"'conv2' has as many inputs as outputs, .*find_layers"):
        folding.fold_batch_norms(*trees, args)
    else:  # the numbers of channels tell
      params, stats = folding.fold_batch_norms(*trees, args)
      actual = model.apply({'params': params, 'batch_stats': stats}, x)
      np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


PARAMS = {'fc1': {'kernel': jnp.ones((2, 3))}, 'fc2': {'kernel': jnp.ones((3, 3))}}
STATS = {'bn1': {'mean': jnp.zeros(3), 'var': jnp.ones(3)}}


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: folding.fold_batch_norms(PARAMS, STATS, [('conv', 'bn1')]), r'convolution pattern'),
    (
      lambda: folding.fold_batch_norms(PARAMS, STATS, Anatomy(norms=[Norm('bn1', 'fc3')])),
      "convolution pattern 'fc3'. Closest",
    ),
    (lambda: folding.fold_batch_norms(PARAMS, STATS, [(r'fc(\d)', r'bn\1')]), "'bn2', which has"),
    (lambda: folding.fold_batch_norms(PARAMS, STATS, [(r'fc\d', 'bn1')]), 'and another module'),
    (
      lambda: folding.fold_batch_norm(
        jnp.ones((2, 3)), None, jnp.ones(2), None, jnp.zeros(3), jnp.ones(3)
      ),
      r'scale of shape \(2,\) does not fit',
    ),
  ],
)
def test_bad_input_is_named(make, match):
  with pytest.raises(ValueError, match=match):
    make()
