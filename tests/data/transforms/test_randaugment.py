import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from jaxlab import data
from jaxlab.data.transforms.randaugment import OPERATIONS, apply_operation, rand_augment

FILL = (124, 116, 104)
RESAMPLE = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}


def photo(height=20, width=28, channels=3, seed=0):
  """Returns a smooth picture with some noise, codes from 30 to 220."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width]
  waves = [np.sin(x / (3 + c) + c) + np.cos(y / (2 + c)) for c in range(channels)]
  image = 125 + 40 * np.stack(waves, -1) + rng.normal(0, 6, (height, width, channels))
  return np.clip(image, 30, 220).astype(np.uint8)


def pillow(image, name, level, positive, increasing, interpolation):
  """The operation by Pillow, levels as in timm's `rand-...-inc1`, or `inc0`."""
  sign = 1 if positive else -1
  gray = image.shape[-1] == 1
  pil = Image.fromarray(image[..., 0] if gray else image)
  kwargs = {'resample': RESAMPLE[interpolation], 'fillcolor': FILL[0] if gray else FILL}
  bits, threshold = int(level * 4 / 10), int(level * 256 / 10)
  factor = max(0.1, 1 + sign * level * 0.09) if increasing else level * 0.18 + 0.1
  if increasing:
    bits, threshold = 4 - bits, 256 - threshold
  width, height = pil.size
  affine = {
    'ShearX': (1, sign * level * 0.03, 0, 0, 1, 0),
    'ShearY': (1, 0, 0, sign * level * 0.03, 1, 0),
    'TranslateX': (1, 0, sign * level * 0.045 * width, 0, 1, 0),
    'TranslateY': (1, 0, 0, 0, 1, sign * level * 0.045 * height),
  }
  added = [min(255, i + int(level * 11)) if i < 128 else i for i in range(256)]
  if name in affine:
    out = pil.transform(pil.size, Image.Transform.AFFINE, affine[name], **kwargs)
  elif name in ('Color', 'Contrast', 'Brightness', 'Sharpness'):
    out = getattr(ImageEnhance, name)(pil).enhance(factor)
  else:
    out = {
      'AutoContrast': lambda: ImageOps.autocontrast(pil),
      'Equalize': lambda: ImageOps.equalize(pil),
      'Invert': lambda: ImageOps.invert(pil),
      'Rotate': lambda: pil.rotate(sign * level * 3, **kwargs),
      'Posterize': lambda: ImageOps.posterize(pil, bits) if bits else pil.point(lambda _: 0),
      'Solarize': lambda: ImageOps.solarize(pil, threshold),
      'SolarizeAdd': lambda: pil.point(added * image.shape[-1]),
    }[name]()
  return np.asarray(out).reshape(image.shape)


@functools.partial(jax.jit, static_argnames=('increasing', 'interpolation'))
def run(image, operation, level, positive, increasing, interpolation):
  fill = np.asarray(FILL[: image.shape[-1]]) / 255
  return apply_operation(
    image / 255,
    operation,
    level,
    positive=positive,
    increasing=increasing,
    fill=fill,
    interpolation=interpolation,
  )


@pytest.mark.parametrize('name', OPERATIONS)
def test_operations_are_pillows(name):
  index = OPERATIONS.index(name)
  for channels, level, positive, increasing, interpolation in (
    (3, 9.0, True, True, 'bilinear'),
    (3, 9.0, False, True, 'bicubic'),
    (3, 4.3, True, False, 'bilinear'),
    (1, 10.0, False, True, 'bicubic'),
  ):
    image = photo(channels=channels)
    choice = (level, positive, increasing, interpolation)
    found = 255 * np.asarray(run(jnp.float32(image), index, *choice))
    distance = np.abs(found - pillow(image, name, *choice))
    assert distance.max() < 1.01, choice
    assert np.mean(distance > 0.01) < 0.02, choice  # float32 at a whole number


def test_flat_and_tiny_images_are_pillows():
  flat = np.full((2, 40, 3), 77, np.uint8)
  for name in ('AutoContrast', 'Equalize', 'Sharpness', 'Contrast'):
    choice = (9.0, True, True, 'bilinear')
    found = 255 * np.asarray(run(jnp.float32(flat), OPERATIONS.index(name), *choice))
    np.testing.assert_allclose(found, pillow(flat, name, *choice), atol=0.01)


@pytest.mark.parametrize('name', OPERATIONS[6:])
def test_level_0_does_nothing_where_more_is_more(name):
  image = photo()
  found = run(jnp.float32(image), OPERATIONS.index(name), 0.0, True, True, 'bilinear')
  np.testing.assert_allclose(255 * np.asarray(found), image, atol=0.01)


IMAGES = jnp.stack([jnp.float32(photo(12, 10, seed=i)) / 255 for i in range(4)])
BATCH = jax.jit(jax.vmap(rand_augment))


@pytest.mark.exhaustive
def test_images_of_a_batch_are_drawn_by_their_own_keys():
  keys = jax.random.split(jax.random.key(3), 64)
  images = jnp.tile(IMAGES, (16, 1, 1, 1))
  batch = BATCH(keys, images)
  np.testing.assert_array_equal(batch, BATCH(keys, images))
  one = jax.jit(rand_augment)
  alone = jnp.stack([one(key, image) for key, image in zip(keys[:8], images)])
  np.testing.assert_allclose(batch[:8], alone, atol=1.01 / 255)
  changed = np.abs(np.asarray(batch - images)).max((1, 2, 3)) > 0.5 / 255
  # A quarter has both operations left out; few of the rest do nothing (level 9 of 10).
  assert 0.5 < changed.mean() < 0.95
  assert batch.min() >= 0 and batch.max() <= 1
  np.testing.assert_allclose(batch * 255, jnp.round(batch * 255), atol=1e-3)


@pytest.mark.exhaustive
def test_eager_is_jit_and_probability_0_is_the_8_bit_image():
  key = jax.random.key(1)
  out = rand_augment(key, IMAGES[0], probability=0.0, num_ops=1)
  np.testing.assert_allclose(out, IMAGES[0], atol=1e-6)
  np.testing.assert_allclose(
    rand_augment(key, IMAGES[0]), jax.jit(rand_augment)(key, IMAGES[0]), atol=1.01 / 255
  )


@pytest.mark.exhaustive
def test_levels_follow_the_clipped_normal(monkeypatch):
  """With one operation left (Brightness) the level can be read off a constant image."""
  brightness = OPERATIONS.index('Brightness')
  module = importlib.import_module('jaxlab.data.transforms.randaugment')
  operate = module._operate
  monkeypatch.setattr(
    module, '_operate', lambda codes, operation, *rest: operate(codes, brightness, *rest)
  )
  image = jnp.full((3, 3, 1), 1 / 3)  # code 85: twice of it is no overflow
  keys = jax.random.split(jax.random.key(0), 500)

  def levels(**options):
    draw = functools.partial(rand_augment, num_ops=1, probability=1.0, **options)
    factor = 3 * jax.jit(jax.vmap(lambda key: draw(key, image)))(keys)[:, 0, 0, 0]
    assert 0.4 < np.mean(factor > 1) < 0.6  # the sign is fair
    return np.abs(np.asarray(factor) - 1) / 0.09

  drawn = levels(magnitude=6.0, magnitude_std=1.0)
  assert abs(drawn.mean() - 6) < 0.2 and abs(drawn.std() - 1) < 0.15
  assert levels(magnitude=9.0, magnitude_std=5.0).max() < 10.2
  uniform = levels(magnitude=8.0, magnitude_std=float('inf'))
  assert uniform.max() < 8.2 and abs(uniform.mean() - 4) < 0.4


@pytest.mark.parametrize(
  'options, message',
  [
    ({'magnitude': 11}, 'magnitude is 11'),
    ({'magnitude_std': -1.0}, 'magnitude_std'),
    ({'num_ops': 0}, 'num_ops'),
    ({'probability': 1.5}, 'probability'),
    ({'fill': (0.1, 0.2)}, 'one for each of 3'),
    ({'fill': 128}, r'values in \[0, 1\]'),
    ({'interpolation': 'nearest'}, 'nearest'),
  ],
)
def test_wrong_arguments_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    rand_augment(jax.random.key(0), IMAGES[0], **options)


def test_wrong_operations_are_refused():
  for options, message in (
    ({'operation': 15, 'level': 1.0}, 'operation is 15'),
    ({'operation': 0, 'level': 10.5}, 'level is 10.5'),
    ({'operation': 0, 'level': 1.0, 'interpolation': 'random'}, 'for rand_augment'),
  ):
    with pytest.raises(ValueError, match=message):
      apply_operation(IMAGES[0], **options)
  with pytest.raises(ValueError, match='2 channels'):
    apply_operation(jnp.zeros((4, 4, 2)), 0, 1.0)
  with pytest.raises(ValueError, match='vmap'):
    apply_operation(IMAGES, 0, 1.0)


def test_it_stands_between_flip_and_normalization():
  """The fill is the mean, which the normalization turns into zeros."""
  plain = {'scale': (1.0, 1.0), 'jitter': None, 'grayscale_probability': 0, 'blur_probability': 0}
  augment = data.resized_crop_augment(
    12, **plain, mean=(0.2, 0.4, 0.6), std=2.0, interpolation='bicubic', rand_augment={'num_ops': 4}
  )
  keys = jax.random.split(jax.random.key(0), 64)
  image = jnp.full((12, 12, 3), 0.9)
  out = np.asarray(jax.jit(jax.vmap(lambda key: augment(key, image)))(keys))
  codes = 255 * (2 * out + np.array([0.2, 0.4, 0.6]))
  np.testing.assert_allclose(codes, np.round(codes), atol=1e-2)
  filled = np.abs(codes - np.array([51, 102, 153])).max(-1) < 1e-2
  assert filled.mean((1, 2)).max() > 0.05
