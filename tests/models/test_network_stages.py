import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from golden_vectors import golden
from models.random_variables import random_images, random_variables, run, run_capture

from jaxlab import models
from jaxlab.models import network_stages

WHOLE = models.ResNet((1, 1, 2), width=4, stem='cifar', strides=(2, 2, 2), num_classes=3)
IMAGES = random_images((2, 16, 16, 1))


@golden('s3l', 'truncated_resnet_shapes')
def test_networks_without_conv5_have_the_sizes_of_the_reference(vectors):
  size = int(vectors['in_image_size'])
  for name in ('resnet18', 'resnet34', 'resnet50'):
    model = models.truncate(models.create(name, num_classes=128))
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    assert count == vectors[f'out_num_params_custom_{name}']
    head = variables['params']['fc']['kernel'].shape
    assert head == (vectors[f'out_feature_dim_custom_{name}'], 128)
    assert head[0] == models.feature_width(model)
    last = f'layer3_{model.stage_sizes[-1] - 1}'
    _, found = jax.eval_shape(
      lambda v, x, m=model, p=last: models.capture(m, v, [p], x), variables, images
    )
    batch, channels, height, width = vectors[f'out_layer3_shape_custom_{name}']
    assert found[last].shape == (batch, height, width, channels)


def test_a_truncated_network_is_the_whole_one_up_to_there():
  cut = models.truncate(WHOLE)
  variables = random_variables(WHOLE, IMAGES)
  last = re.compile(models.last_stage(WHOLE))
  shared = {
    kind: traverse_util.unflatten_dict(
      {p: a for p, a in traverse_util.flatten_dict(tree).items() if not last.match('/'.join(p))}
    )
    for kind, tree in variables.items()
  }
  features = run(cut.clone(num_classes=None), shared, IMAGES)
  _, found = run_capture(WHOLE, variables, ['layer2_0'], IMAGES)
  np.testing.assert_allclose(features, jnp.mean(found['layer2_0'], (1, 2)), rtol=1e-5)
  assert last.pattern == r'layer3_\d+/.*' and cut.stage_sizes == (1, 1)


@pytest.mark.parametrize(
  ('name', 'whole', 'cut'), [('resnet50', 32, 16), ('cifar_resnet18', 8, 4), ('resnet18d', 32, 16)]
)
def test_the_total_stride_is_that_of_the_last_map(name, whole, cut):
  model = models.create(name)
  assert models.total_stride(model) == whole
  assert models.total_stride(models.truncate(model)) == cut
  # One position of the last map for so many pixels.
  images = jax.ShapeDtypeStruct((1, 2 * whole, 2 * whole, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  last = f'layer{len(model.stage_sizes)}_0'
  _, found = jax.eval_shape(lambda v, x: models.capture(model, v, [last], x), variables, images)
  assert found[last].shape[1:3] == (2, 2)


def test_images_below_the_total_stride_are_refused():
  models.require_resolution(models.create('resnet18'), 32)
  with pytest.raises(ValueError, match=r'images of 31 pixels are smaller than .* 32'):
    models.require_resolution(models.create('resnet18'), 31)


def shared_and_whole():
  whole = random_variables(WHOLE, IMAGES, seed=1)
  cut = random_variables(models.truncate(WHOLE), IMAGES, seed=2)
  return cut, whole


def test_shared_stages_are_attached_bit_for_bit_and_others_stay_as_drawn():
  cut, whole = shared_and_whole()
  fresh = (models.last_stage(WHOLE), 'fc/.*')
  found = traverse_util.flatten_dict(models.attach_stage(cut, whole, fresh), sep='/')
  for path, leaf in traverse_util.flatten_dict(whole, sep='/').items():
    drawn = re.fullmatch('|'.join(fresh), path.partition('/')[2])
    expected = leaf if drawn else traverse_util.flatten_dict(cut, sep='/')[path]
    assert np.asarray(found[path]).tobytes() == np.asarray(expected).tobytes(), path
  changed = [path for path in found if 'layer1_0' in path]
  assert changed and any('batch_stats' in path for path in changed)


def test_what_is_missing_left_over_or_of_another_shape_is_listed():
  cut, whole = shared_and_whole()
  with pytest.raises(ValueError) as error:
    models.attach_stage(cut, whole)
  text = str(error.value)
  assert 'missing: params/layer3_0/conv1/kernel (3, 3, 8, 16)' in text
  assert 'missing: batch_stats/layer3_1/bn2/mean (16,)' in text
  assert 'shape: params/fc/kernel is (8, 3), (16, 3) is needed' in text
  with pytest.raises(ValueError, match=r'left over: params/layer3_0/conv1/kernel'):
    models.attach_stage(whole, cut, ['fc/.*'])


def test_what_is_missing_or_left_over_may_be_allowed():
  cut, whole = shared_and_whole()
  plain = models.attach_stage(cut, whole, [models.last_stage(WHOLE), 'fc/.*'])
  allowed = models.attach_stage(cut, whole, ['fc/.*'], allow_missing=True)
  jax.tree.map(np.testing.assert_array_equal, allowed, plain)
  back = models.attach_stage(whole, cut, ['fc/.*'], allow_unused=True)
  np.testing.assert_array_equal(
    back['params']['layer2_0']['conv1']['kernel'], whole['params']['layer2_0']['conv1']['kernel']
  )
  assert 'layer3_0' not in back['params']


def test_a_stage_can_be_drawn_anew():
  pretrained, drawn = (random_variables(WHOLE, IMAGES, seed=i) for i in (3, 4))
  found = models.attach_stage(pretrained, drawn, [models.last_stage(WHOLE)])
  for name, source in (('layer2_0', pretrained), ('layer3_1', drawn), ('fc', pretrained)):
    jax.tree.map(np.testing.assert_array_equal, found['params'][name], source['params'][name])


@pytest.mark.parametrize(
  ('model', 'count', 'message'),
  [(WHOLE, 3, 'count=3 of 3 stages: expected 0 to 2'), (models.MLP((4,), 2), 1, 'give a ResNet')],
)
def test_networks_without_such_stages_are_refused(model, count, message):
  with pytest.raises(ValueError, match=message):
    network_stages.truncate(model, count)
