import jax
import jax.numpy as jnp
import pytest

from jaxlab.models import create
from jaxlab.models.architectures import names


@pytest.mark.parametrize('name', names(patch_size=8, image_size=32))
def test_every_name_traces_with_its_number_of_classes(name):
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  # One block a stage (or two in all) is enough: depths are counted by parameters elsewhere.
  small = (
    {'depth': 2} if '_patch' in name else {'stage_sizes': (1,) * len(create(name).stage_sizes)}
  )
  for overrides, features in (
    ({}, 10 if name.startswith('cifar') else 1000),
    ({'num_classes': None}, None),
  ):
    model = create(name, **small, **overrides)
    out = jax.eval_shape(lambda x, m=model: m.init_with_output(jax.random.key(0), x)[0], images)
    assert out.shape == (2, features or out.shape[1])


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
    ('qqq', 'known: .*resnet101'),
  ],
)
def test_unknown_names_raise_with_the_closest(name, closest):
  with pytest.raises(ValueError, match=f'no network is called {name!r}.*{closest}'):
    create(name)


def test_unknown_fields_raise_with_the_known_ones():
  with pytest.raises(ValueError, match=r"ResNet has no field 'num_clases'; .*num_classes"):
    create('resnet18', num_clases=3)
