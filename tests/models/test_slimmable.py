import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from models.random_variables import random_images, random_variables, run

from jaxlab import models
from jaxlab.models import BasicBlock, Encoder, MLPHead, MobileNetV2, ResNet, ViT

RESNET = ResNet((1, 1), width=16, widths=(16, 32), stem='cifar')
VIT = ViT(4, 8, 32, 2, 2)
MOBILE = MobileNetV2((1, 2), (16, 24), (1, 2), stem_width=32, head_width=40, stem='cifar')


@golden('us3l', 'make_divisible')
def test_channels_are_rounded_as_in_the_official_code(vectors):
  found = [models.make_divisible(float(value)) for value in vectors['in_values']]
  np.testing.assert_array_equal(found, vectors['out_channels'])


@golden('us3l', 'us_basic_block')
def test_a_slimmable_block_agrees_with_the_official_one_at_each_width(vectors):
  layers = {
    'conv1': 'conv1', 'conv2': 'conv2', 'bn1': 'bn1', 'bn2': 'bn2',
    'downsample.0': 'downsample_0', 'downsample.1': 'downsample_1',
  }  # fmt: skip
  whole: dict = {}
  for name, leaf in vectors.tree('param__').items():
    module, kind = layers[name.rpartition('.')[0]], name.rpartition('.')[2]
    own = whole.setdefault(module, {})
    if leaf.ndim == 4:
      own['kernel'] = jnp.float32(leaf.transpose(2, 3, 1, 0))
    else:
      own['scale' if kind == 'weight' else 'bias'] = jnp.float32(leaf)
  features = whole['conv1']['kernel'].shape[-1]
  for index, width in enumerate(vectors['in_widths']):
    x = jnp.float32(vectors[f'in_x{index}_nchw'].transpose(0, 2, 3, 1))
    block = BasicBlock(models.make_divisible(features * width), vectors.param('stride'))
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)['params']

    def squares(params, x, block=block, shapes=shapes):
      own = {'params': models.slice_params(params, shapes)}
      y, _ = block.apply(own, x, True, mutable=['batch_stats'])
      return jnp.sum(y * y), y

    gradient = jax.jit(jax.value_and_grad(squares, (0, 1), has_aux=True))
    (_, y), (by_params, by_x) = gradient(whole, x)
    assert_close(y, vectors[f'out_y{index}_nchw'].transpose(0, 2, 3, 1), 5e-6)
    assert_close(by_x, vectors[f'grad_x{index}'].transpose(0, 2, 3, 1), 2e-5)
    kernel = vectors[f'grad{index}__conv1.weight'].transpose(2, 3, 1, 0)
    assert_close(by_params['conv1']['kernel'], kernel, 2e-5)
    assert_close(by_params['bn1']['scale'], vectors[f'grad{index}__bn1.weight'], 2e-5)


@pytest.mark.parametrize('model', [RESNET, Encoder(RESNET, MLPHead((12, 6)))])
def test_a_narrow_network_trains_its_leading_channels_alone(model):
  x = random_images((4, 8, 8, 3))
  params = random_variables(model, x)['params']

  def loss(params):
    small, own = models.at_width(model, params, 0.5, x)
    y, _ = small.apply({'params': own}, x, train=True, mutable=['batch_stats'])
    return jnp.sum(jnp.sin(y))

  gradient = jax.jit(jax.grad(loss))(params)
  backbone = gradient['backbone'] if isinstance(model, Encoder) else gradient
  kernel = np.array(backbone['layer2_0']['conv2']['kernel'])
  assert np.all(kernel[:, :, :16, :16] != 0)
  kernel[:, :, :16, :16] = 0
  assert not kernel.any()
  if isinstance(model, Encoder):
    first = np.asarray(gradient['projector']['fc0']['kernel'])
    assert first[:16].any() and not first[16:].any()


def test_a_narrow_vit_has_the_leading_channels_of_every_head():
  x = random_images((2, 8, 8, 3))
  params = random_variables(VIT, x)['params']
  small, own = models.at_width(VIT, params, 0.5, x)
  assert (small.width, small.num_heads) == (16, 2)
  whole = np.asarray(params['blocks_0']['attention']['qkv']['kernel'])  # [32, (q k v, head, 16)]
  found = np.asarray(own['blocks_0']['attention']['qkv']['kernel'])
  expected = whole[:16].reshape(16, 3, 2, 16)[..., :8].reshape(16, 48)
  np.testing.assert_array_equal(found, expected)
  whole = np.asarray(params['blocks_0']['attention']['proj']['kernel'])
  found = np.asarray(own['blocks_0']['attention']['proj']['kernel'])
  np.testing.assert_array_equal(found, whole.reshape(2, 16, 32)[:, :8, :16].reshape(16, 16))
  assert np.isfinite(jax.jit(small.apply)({'params': own}, x)).all()


@pytest.mark.parametrize(
  ('width', 'stem', 'widths', 'inner'),
  [
    (0.25, 8, (8, 8), (48, 24, 40)),
    (0.5, 16, (8, 16), (96, 48, 72)),
    (0.75, 24, (16, 24), (144, 72, 112)),
  ],
)
def test_a_narrow_mobilenet_is_the_ordinary_narrower_network(width, stem, widths, inner):
  x = random_images((2, 8, 8, 3))
  params = random_variables(MOBILE, x)['params']
  small, own = models.at_width(MOBILE, params, width, x)
  ordinary = MobileNetV2(
    (1, 2), widths, (1, 2), stem_width=stem, head_width=40, stem='cifar', inner_widths=inner,
    shortcuts=(False, False),
  )  # fmt: skip
  shapes = jax.eval_shape(ordinary.init, jax.random.key(0), x)['params']
  lead = lambda leaf, shape: leaf[tuple(map(slice, shape.shape))]  # noqa: E731
  expected = jax.tree.map(lead, params, shapes)
  jax.tree.map(np.testing.assert_array_equal, own, expected)
  assert own['blocks_1_1']['conv_dw']['kernel'].shape == (3, 3, 1, inner[-1])
  assert own['conv_head']['kernel'].shape == (1, 1, widths[-1], 40)
  y, _ = run(small, {'params': own}, x, train=True)
  expected_y, _ = run(ordinary, {'params': expected}, x, train=True)
  assert y.shape == (2, 40)
  np.testing.assert_array_equal(y, expected_y)


def test_a_narrow_efficientnet_has_leading_gates():
  model = models.EfficientNet((1, 1), (16, 24), (1, 2), stem_width=16, head_width=24, stem='cifar')
  x = random_images((2, 8, 8, 3))
  params = random_variables(model, x)['params']
  small, own = models.at_width(model, params, 0.5, x)
  assert own['blocks_1_0']['se']['conv_reduce']['kernel'].shape == (1, 1, 48, 2)
  y, _ = run(small, {'params': own}, x, train=True)
  assert np.isfinite(y).all()


def test_a_shortcut_is_where_the_whole_network_has_one():
  x = random_images((2, 8, 8, 3))
  assert models.narrow(MOBILE.clone(widths=(32, 32), strides=(1, 1)), 0.5).shortcuts == (True, True)
  assert not models.narrow(MOBILE.clone(shortcuts=(True, False)), 0.5).shortcuts[0]
  small, own = models.at_width(MOBILE, random_variables(MOBILE, x)['params'], 0.25, x)
  y, other = (
    run(net, {'params': own}, x, train=True)[0] for net in (small, small.clone(shortcuts=None))
  )
  assert np.any(y != other)


def test_a_narrow_network_without_statistics_of_its_own_says_so():
  x = random_images((2, 8, 8, 3))
  small, own = models.at_width(RESNET, random_variables(RESNET, x)['params'], 0.5, x)
  with pytest.raises(ValueError, match=r'no running statistics .*recompute_batch_stats'):
    small.apply({'params': own}, x)


def test_the_whole_network_is_itself():
  x = random_images((2, 8, 8, 3))
  params = random_variables(RESNET, x)['params']
  model, own = models.at_width(RESNET, params, 1, x)
  assert model is RESNET and own is params


@pytest.mark.parametrize(
  ('model', 'width', 'message'),
  [
    (RESNET, 0, r'width=0: expected a share of the channels in \(0, 1\]'),
    (RESNET, 1.5, 'width=1.5'),
    (RESNET.clone(shortcut='pad'), 0.5, "shortcut='pad'"),
    (VIT.clone(activation='swiglu'), 0.5, 'swiglu'),
    (models.create('resnet50', num_classes=None), 0.3, 'a multiple of 0.125'),
    (RESNET.clone(width=4), 0.75, 'width=0.75: 4 channels round to 9, more than there are'),
    (models.create('vgg11', num_classes=None), 0.5, 'known are ResNet, MobileNetV2, ViT, Encoder'),
  ],
)
def test_what_cannot_be_narrow_is_refused(model, width, message):
  with pytest.raises(ValueError, match=message):
    models.narrow(model, width)


def test_parameters_of_another_network_are_refused_with_all_that_differs():
  shapes = {'a': jax.ShapeDtypeStruct((3,), 'float32'), 'c': jax.ShapeDtypeStruct((), 'float32')}
  with pytest.raises(ValueError, match=r'a: \(2,\) holds no \(3,\); b: in one .*; c: in one'):
    models.slice_params({'a': jnp.zeros(2), 'b': jnp.zeros(2)}, shapes)


@golden('us3l', 'dynamic_sampling')
def test_the_range_of_widths_grows_as_in_the_official_code(vectors):
  epochs = vectors.param('epochs')
  widths = vectors.param('min_width'), vectors.param('max_width')
  floor = jax.jit(lambda epoch: models.width_floor(epoch, epochs, *widths))
  found = [floor(epoch) for epoch in range(epochs)]
  assert_close(found, vectors['out_min_width_per_epoch'], 1e-6)
  several = np.asarray(found) < widths[1]
  np.testing.assert_array_equal(np.where(several, 3, 1), vectors['out_num_widths_per_epoch'])


def test_epochs_behind_four_quarters_keep_the_smallest_width():
  assert float(models.width_floor(10, 11)) == 0.25
  with pytest.raises(ValueError, match='epochs=3'):
    models.width_floor(0, 3)
  with pytest.raises(ValueError, match=r'min_width=0\.5, max_width=0\.25'):
    models.width_floor(0, 8, 0.5, 0.25)
