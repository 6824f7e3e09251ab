import json

import jax
import jax.numpy as jnp
import pytest
import tables
from golden_vectors import OWN_DIR

from jaxlab.models import abstract_variables, create
from jaxlab.models.architectures import names
from jaxlab.models.configurations import SIZES
from jaxlab.models.variants import DEFAULT_TAGS


@pytest.mark.parametrize('name', tables.some(names(), 12))
def test_every_name_traces_with_its_number_of_classes(name):
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  # One block a stage (or two in all) is enough: depths are counted by parameters elsewhere.
  if name.startswith('swin'):
    small = {'depths': (1, 1), 'patch_size': 4, 'image_size': 32}
  elif '_patch' in name:
    small = {'depth': 2, 'patch_size': 8, 'image_size': 32}
  elif name.startswith('convnext'):
    small = {'depths': (1, 1)}
  elif name.startswith('densenet'):
    small = {'block_sizes': (2, 1)}
  elif name.startswith('t2t'):
    small = {'depth': 1}
  elif name.startswith('pvt'):
    small = {'depths': (1,) * 4}
  elif name in ('cifar_preact_resnet18', 'convnet', 'cnn13', 'mlp', 'linear'):
    small = {}
  else:
    small = {'stage_sizes': (1,) * 3}
  ten = name.startswith(('cifar', 'convnet', 'cnn13', 'shake', 'wrn', 'mlp', 'linear'))
  assert ten == (create(name).num_classes == 10)
  for num_classes in (create(name).num_classes, 7, None):
    model = create(name, **small, num_classes=num_classes)
    out = jax.eval_shape(lambda x, m=model: m.init_with_output(jax.random.key(0), x)[0], images)
    assert out.shape == (2, num_classes or out.shape[1])


def test_swin_names_carry_patch_window_and_image_size():
  model = create('swin_base_patch2_window12_48')
  assert (model.patch_size, model.window_size, model.image_size) == (2, 12, 48)
  assert (model.width, model.depths, model.num_heads) == (128, (2, 2, 18, 2), (4, 8, 16, 32))
  with pytest.raises(ValueError, match='30 x 30 pixels does not divide into patches'):
    create('swin_tiny_patch4_window7_30')


# timm's networks of these names.
@pytest.mark.parametrize(
  'name, parameters',
  [
    ('swin_tiny_patch4_window7_224', 28_288_354),
    ('swin_small_patch4_window7_224', 49_606_258),
    ('swin_base_patch4_window12_384', 87_903_584),
    ('pvt_v2_b0', 3_666_760),
    ('pvt_v2_b1', 14_009_000),
    ('pvt_v2_b2', 25_362_856),
  ],
)
def test_transformers_have_timms_number_of_parameters(name, parameters):
  tree = abstract_variables(create(name))['params']
  assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == parameters


def test_transformer_names_carry_patch_and_image_size():
  model = create('vit_small_patch4_64')
  assert (model.patch_size, model.image_size, model.width, model.num_heads) == (4, 64, 384, 6)
  assert create('deit_base_distilled_patch16_384').distilled
  assert not create('deit_base_patch16_384').distilled
  with pytest.raises(ValueError, match='does not divide into patches'):
    create('vit_tiny_patch16_100')


def test_image_networks_have_names_of_timm():
  theirs = json.loads((OWN_DIR / 'models' / 'timm_names.json').read_text())
  own = (
    'bcnn',
    'cifar_',
    'convnet',
    'cnn13',
    'shake_',
    'wrn',
    'mlp',
    'linear',
    't2t_',
    'thin_',
    'tiny_',
  )
  assert [name for name in names() if not name.startswith(own) and name not in theirs] == []
  assert len(names()) == len(set(names()))
  with_weights = {name for name in DEFAULT_TAGS if name not in SIZES}
  assert with_weights <= set(names())


@pytest.mark.parametrize(
  'name, closest',
  [
    ('resnet19', 'resnet18'),
    ('Resnet-50', 'resnet50'),
    ('cifar_resnet44', 'cifar_resnet34'),
    ('vit_tiny_patch16', 'vit_tiny_patch16_224'),
    ('deit_tny_patch16_224', 'deit_tiny_patch16_224'),
    ('vit_tiny_distilled_patch16_224', 'deit_tiny_distilled_patch16_224'),
    ('swin_tiny_patch4_224', 'swin_tiny_patch4_window7_224'),
    ('swin_huge_patch4_window7_224', 'swin_base_patch4_window7_224'),
    ('efficientnet_b9', 'efficientnet_b8'),
    ('vit_giant_patch14_224', 'vit_large_patch14_224'),
    ('convnext_tny', 'convnext_tiny'),
    ('mobilenetv2_110', 'mobilenetv2_110d'),
    ('vit', 'vit_tiny_patch16_224, vit_'),
    ('qqq', 'families: resnet, .*, vit, .*gpt'),
  ],
)
def test_unknown_names_raise_with_the_closest(name, closest):
  with pytest.raises(ValueError, match=f'no network is called {name!r}.*{closest}'):
    create(name)


def test_unknown_fields_raise_with_the_known_ones():
  with pytest.raises(ValueError, match=r"ResNet has no field 'num_clases'; .*num_classes"):
    create('resnet18', num_clases=3)
