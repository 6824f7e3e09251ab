import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import traverse_util
from models.random_variables import random_images, random_variables

from jaxlab import models
from jaxlab.compression import (
  adaptor_hooks,
  adaptor_positions,
  candidate_blocks,
  fold_adaptors,
  init_adaptors,
)

SMALL = {'stage_sizes': (3, 2), 'width': 4, 'stem': 'cifar', 'num_classes': 3}


@pytest.mark.parametrize(
  ('dropped', 'before', 'after'),
  [
    (
      'layer1_1',
      'layer1_2/conv1 layer2_0/conv1 layer2_0/downsample_0',
      'layer1_0/conv2',
    ),
    (
      'layer2_2',
      'layer2_3/conv1 layer3_0/conv1 layer3_0/downsample_0',
      'layer2_0/downsample_0 layer2_0/conv2 layer2_1/conv2',
    ),
    ('layer4_2', '', 'layer4_0/downsample_0 layer4_0/conv2 layer4_1/conv2'),
    ('layer1_1 layer1_2', 'layer2_0/conv1 layer2_0/downsample_0', 'layer1_0/conv2'),
  ],
)
def test_positions_of_resnet34_are_those_of_official_code(dropped, before, after):
  found = adaptor_positions(models.create('resnet34'), dropped.split())
  assert (found.before, found.after) == (tuple(before.split()), tuple(after.split()))


@pytest.mark.parametrize(
  ('dropped', 'before', 'after'),
  [
    # features.9 of torchvision, and features.3.
    (
      'blocks_3_2',
      'blocks_3_3/conv_pw blocks_4_0/conv_pw',
      'blocks_3_0/conv_pwl blocks_3_1/conv_pwl',
    ),
    ('blocks_1_1', 'blocks_2_0/conv_pw', 'blocks_1_0/conv_pwl'),
  ],
)
def test_positions_of_mobilenetv2_are_those_of_official_code(dropped, before, after):
  found = adaptor_positions(models.create('mobilenetv2_100'), [dropped])
  assert (found.before, found.after) == (tuple(before.split()), tuple(after.split()))


def test_a_bottlenecks_last_convolution_is_that_of_the_trunk_or_of_the_code():
  model = models.create('resnet50')
  trunk = adaptor_positions(model, ['layer4_1'])
  assert trunk.after == ('layer4_0/downsample_0', 'layer4_0/conv3')
  code = adaptor_positions(model, ['layer4_1'], last_conv='code')
  assert code.after == ('layer4_0/downsample_0', 'layer4_0/conv2') and code.before == trunk.before


def test_candidates_keep_the_shape_and_begin_no_stage():
  sizes = {1: 3, 2: 4, 3: 6, 4: 3}
  expected = tuple(f'layer{s}_{i}' for s, size in sizes.items() for i in range(1, size))
  for name in ('resnet34', 'resnet50'):
    assert candidate_blocks(models.create(name)) == expected
  # 3 | 5, 6 | 8, 9, 10 | 12, 13 | 15, 16 of torchvision's features.
  expected = {1: 2, 2: 3, 3: 4, 4: 3, 5: 3}
  found = candidate_blocks(models.create('mobilenetv2_100'))
  assert found == tuple(f'blocks_{s}_{i}' for s, size in expected.items() for i in range(1, size))


@pytest.mark.parametrize(
  ('name', 'last_conv'),
  tables.cells(['basic', 'bottleneck', 'mobilenetv2'], ['trunk', 'code'], 2),
)
def test_fresh_adaptors_change_nothing_and_folded_ones_are_exact(name, last_conv):
  x = random_images((2, 9, 9, 3))
  if name == 'mobilenetv2':
    sizes = {'stage_sizes': (1, 2, 2), 'widths': (4, 6, 8), 'stem_width': 4, 'head_width': 12}
    model, dropped = models.MobileNetV2(**sizes, stem='cifar', num_classes=3), 'blocks_1_1'
  else:
    model, dropped = models.ResNet(**SMALL, block=name), 'layer1_1'
  variables = random_variables(model, x)
  positions = adaptor_positions(model, [dropped], last_conv=last_conv)
  fresh = init_adaptors(variables['params'], positions)
  assert len(traverse_util.flatten_dict(fresh)) == len(positions.before) + len(positions.after)
  rng = np.random.default_rng(1)
  moved = jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape), fresh)
  hooks = adaptor_hooks(fresh)
  run = jax.jit(lambda v: models.apply(model, v, x, hooks=hooks))
  plain = jax.jit(lambda params: model.apply({**variables, 'params': params}, x))
  whole = plain(variables['params'])
  np.testing.assert_allclose(run({**variables, 'adaptors': fresh}), whole, rtol=0, atol=1e-6)
  expected = run({**variables, 'adaptors': moved})
  assert np.abs(expected - whole).max() > 1e-2
  np.testing.assert_allclose(
    plain(fold_adaptors(variables['params'], moved)), expected, rtol=1e-5, atol=2e-6
  )


def test_biases_are_folded_behind_a_convolution_alone():
  params = {'c': {'kernel': jnp.ones((1, 1, 2, 3)), 'bias': jnp.arange(3.0)}}
  turn = jnp.array([[0.0, 2, 0], [1, 0, 0], [0, 0, 1]])
  assert fold_adaptors(params, {'c': {'after': turn}})['c']['bias'].tolist() == [2, 0, 2]
  assert fold_adaptors(params, {'c': {'before': jnp.eye(2)}})['c']['bias'].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda m: adaptor_positions(m, ['layer2_0']), 'dropped: layer2_0: expected some of layer1_1'),
    (lambda m: adaptor_positions(m, ['layer1_0']), 'dropped: layer1_0'),
    (lambda m: adaptor_positions(m, []), r'dropped: \[\]'),
    (lambda m: adaptor_positions(m, 'layer1_1'), "dropped: 'layer1_1'"),
    (lambda m: adaptor_positions(m, ['layer1_1'], last_conv='last'), "last_conv='last'"),
    (
      lambda m: adaptor_positions(models.create('resnext50_32x4d'), ['layer1_1'], last_conv='code'),
      'a convolution in groups',
    ),
    (lambda m: candidate_blocks(models.ResNet((1, 1))), 'no block can be dropped'),
    (lambda m: candidate_blocks(models.create('vit_tiny_patch16_224')), 'one branch of conv'),
    (
      lambda m: fold_adaptors({'c': {'kernel': jnp.ones((2, 3))}}, {'c': {'after': jnp.eye(2)}}),
      r'c/after: an adaptor \(2, 2\) does not fit the kernel \(2, 3\)',
    ),
    (lambda m: fold_adaptors({}, {'c': {'after': jnp.eye(2)}}), "'c': there is no such conv"),
  ],
)
def test_what_cannot_be_adapted_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(models.ResNet(**SMALL))
