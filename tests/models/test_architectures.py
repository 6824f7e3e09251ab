import jax
import jax.numpy as jnp
import pytest

from jaxlab.models import abstract_variables, create
from jaxlab.models.architectures import names


@pytest.mark.parametrize('name', names(patch_size=8, image_size=32))
def test_every_name_traces_with_its_number_of_classes(name):
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  # One block a stage (or two in all) is enough: depths are counted by parameters elsewhere.
  if name.startswith('swin'):
    small = {'depths': (1, 1)}
  elif '_patch' in name:
    small = {'depth': 2}
  elif name in ('mlp', 'linear'):
    small = {}
  else:
    small = {'stage_sizes': (1,) * 3}
  for overrides, features in (
    ({}, 10 if name.startswith(('cifar', 'wrn', 'mlp', 'linear')) else 1000),
    ({'num_classes': None}, None),
  ):
    model = create(name, **small, **overrides)
    out = jax.eval_shape(lambda x, m=model: m.init_with_output(jax.random.key(0), x)[0], images)
    assert out.shape == (2, features or out.shape[1])


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
  ],
)
def test_swins_have_timms_number_of_parameters(name, parameters):
  tree = abstract_variables(create(name))['params']
  assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == parameters


def test_transformer_names_carry_patch_and_image_size():
  model = create('vit_small_patch4_64')
  assert (model.patch_size, model.image_size, model.width, model.num_heads) == (4, 64, 384, 6)
  assert create('deit_base_distilled_patch16_384').distilled
  assert not create('deit_base_patch16_384').distilled
  with pytest.raises(ValueError, match='does not divide into patches'):
    create('vit_tiny_patch16_100')


@pytest.mark.parametrize(
  'name, closest',
  [
    ('resnet19', 'resnet18'),
    ('Resnet-50', 'resnet50'),
    ('cifar_resnet44', 'cifar_resnet34'),
    ('vit_tiny_patch16', 'vit_tiny_patch16_224'),
    ('deit_tny_patch16_224', 'deit_tiny_patch16_224'),
    ('vit_tiny_distilled_patch16_224', 'deit_tiny_distilled_patch16_224'),
    ('swin_tiny_patch4_224', 'swin_tiny_patch16_window7_224'),
    ('mobilenetv2_110', 'mobilenetv2_110d'),
    ('qqq', 'known: .*resnet101'),
  ],
)
def test_unknown_names_raise_with_the_closest(name, closest):
  with pytest.raises(ValueError, match=f'no network is called {name!r}.*{closest}'):
    create(name)


def test_unknown_fields_raise_with_the_known_ones():
  with pytest.raises(ValueError, match=r"ResNet has no field 'num_clases'; .*num_classes"):
    create('resnet18', num_clases=3)
