import jax
import numpy as np
import pytest
from models.random_variables import random_images, random_variables

from jaxlab import models
from jaxlab.compression import filter_plan, keep_count, slice_network

RESNET = models.ResNet((2, 2), width=6, stem='cifar', num_classes=3)


@pytest.mark.parametrize('size', range(1, 41))
def test_counts_are_the_exact_ceiling(size):
  for tenths in range(10):
    assert keep_count(size, tenths / 10) == -(-size * (10 - tenths) // 10)


def test_the_filters_of_the_largest_norm_stay_and_ties_go_to_the_first():
  variables = random_variables(RESNET, random_images((1, 8, 8, 3)))
  kernels = {
    name: own['conv1']['kernel'] for name, own in variables['params'].items() if 'layer' in name
  }
  kernels['layer1_1'][..., :] = kernels['layer1_1'][..., :1]
  found = filter_plan(RESNET, variables, 0.5)
  for block in ('layer1_0', 'layer2_1'):
    sums = [
      sum(abs(float(v)) for v in kernels[block][..., o].ravel())
      for o in range(kernels[block].shape[-1])
    ]
    expected = np.sort(np.argsort(sums)[len(sums) // 2 :])
    np.testing.assert_array_equal(found.keep[f'{block}/conv1'], expected)
  assert found.keep['layer1_1/conv1'] == (0, 1, 2)
  # The block that changes the shape stays whole, as do all trunks.
  assert set(found.keep) == {f'{own}/conv1' for own in ('layer1_0', 'layer1_1', 'layer2_1')}


def test_a_share_of_nearly_all_leaves_one():
  assert keep_count(3, 1 - 1e-12) == 1


def test_of_an_inverted_residual_the_expansion_alone_counts():
  model = models.MobileNetV2(
    stage_sizes=(1, 2), widths=(4, 4), stem_width=8, head_width=8, stem='cifar', num_classes=3
  )
  variables = random_variables(model, random_images((1, 8, 8, 3)))
  block = variables['params']['blocks_1_1']
  order = np.random.default_rng(0).permutation(block['conv_pw']['kernel'].shape[-1])
  # By the depthwise convolutions, which are larger, the order would be the opposite.
  block['conv_pw']['kernel'] = np.ones_like(block['conv_pw']['kernel']) * (1 + order)
  block['conv_dw']['kernel'] = np.ones_like(block['conv_dw']['kernel']) * 1e3 * (1 - order)
  found = filter_plan(model, variables, 0.5).keep['blocks_1_1/conv_pw']
  np.testing.assert_array_equal(found, np.flatnonzero(order >= len(order) // 2))


@pytest.mark.parametrize(
  ('model', 'all_convs', 'expected'),
  [
    (models.create('resnet50'), False, {'layer3_4/conv2': 128}),
    (models.create('resnet50'), True, {'layer3_4/conv1': 128, 'layer3_4/conv2': 128}),
    (models.create('mobilenetv2_100'), False, {'blocks_3_2/conv_pw': 192}),
  ],
)
def test_the_filters_of_other_blocks(model, all_convs, expected):
  found = filter_plan(model, None, 0.5, all_convs=all_convs)
  own = {
    name: len(kept) for name, kept in found.keep.items() if name[:8] == next(iter(expected))[:8]
  }
  assert {name: size for name, size in own.items() if name in expected} == expected
  assert all('/' in name for name in found.keep)


def test_without_variables_the_shapes_are_the_same():
  x = random_images((1, 8, 8, 3))
  variables = random_variables(RESNET, x)
  small = [
    slice_network(RESNET, variables, filter_plan(RESNET, own, 0.4)) for own in (variables, None)
  ]
  assert small[0][0] == small[1][0]
  jax.tree.map(lambda a, b: a.shape == b.shape or pytest.fail(), *(own for _, own in small))


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: keep_count(8, 1.0), r'ratio=1.0: expected a share in \[0, 1\)'),
    (lambda: keep_count(8, -0.1), 'ratio=-0.1'),
    (lambda: keep_count(0, 0.5), 'size=0'),
    (lambda: filter_plan(RESNET, None, 1.0), 'ratio=1.0'),
    (lambda: filter_plan(RESNET, None, 0.5, blocks=['layer9_0']), "'layer9_0' has no filters"),
  ],
)
def test_what_cannot_be_pruned_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
