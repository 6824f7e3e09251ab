import colorsys
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import data


def _gray(image):
  if image.shape[-1] == 1:
    return image
  return (image @ np.array([0.2989, 0.587, 0.114]))[..., None]


def _hue(image, shift):
  out = np.empty_like(image)
  for index in np.ndindex(image.shape[:2]):
    h, s, v = colorsys.rgb_to_hsv(*image[index])
    out[index] = colorsys.hsv_to_rgb((h + shift) % 1.0, s, v)
  return out


def _jitter_reference(image, order, brightness, contrast, saturation, hue):
  """Torchvision's functional adjustments in float64, one after the other."""
  image = np.asarray(image, np.float64)

  def blend(x, other, factor):
    return np.clip(factor * x + (1 - factor) * other, 0, 1)

  for operation in order:
    if operation == 0:
      image = blend(image, 0.0, brightness)
    elif operation == 1:
      image = blend(image, _gray(image).mean(), contrast)
    elif operation == 2 and image.shape[-1] == 3:
      image = blend(image, _gray(image), saturation)
    elif operation == 3 and image.shape[-1] == 3 and hue is not None:
      image = _hue(image, hue)
  return image


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('with_hue', [True, False])
def test_jitter_agrees_with_reference_in_every_order(channels, with_hue):
  rng = np.random.default_rng(0)
  orders = np.array(list(itertools.permutations(range(4))))
  images = rng.random((24, 6, 5, channels), np.float32)
  images[0, 0, 0] = images[0, 0, 1] = 0.5  # gray pixels have no hue
  images[0, 1, 0] = 0
  factors = rng.uniform(0.4, 1.7, (24, 3)).astype(np.float32)
  shifts = rng.uniform(-0.5, 0.5, 24).astype(np.float32) if with_hue else [None] * 24

  def jitter(image, order, f, hue):
    return data.jitter_colors(image, order, f[0], f[1], f[2], hue)

  in_axes = (0, 0, 0, 0 if with_hue else None)
  hues = shifts if with_hue else None
  actual = jax.jit(jax.vmap(jitter, in_axes))(images, orders, factors, hues)
  for i in range(24):
    expected = _jitter_reference(images[i], orders[i], *factors[i], shifts[i])
    np.testing.assert_allclose(actual[i], expected, atol=3e-6)


def test_drawn_arguments_cover_torchvisions_ranges():
  keys = jax.random.split(jax.random.key(0), 2000)
  drawn = jax.jit(jax.vmap(lambda key: data.draw_color_jitter(key, 0.4, 0.2, 1.5, 0.1)))(keys)
  for name, low, high in (
    ('brightness', 0.6, 1.4),
    ('contrast', 0.8, 1.2),
    ('saturation', 0.0, 2.5),
    ('hue', -0.1, 0.1),
  ):
    values = np.asarray(drawn[name])
    assert low <= values.min() < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < values.max() <= high
    assert abs(values.mean() - (low + high) / 2) < 0.05 * (high - low)
  orders = np.asarray(drawn['order'])
  seen, counts = np.unique(orders, axis=0, return_counts=True)
  assert len(seen) == 24 and counts.min() > 40
  assert data.draw_color_jitter(keys[0], 0.4, 0.4, 0.4, 0.0)['hue'] is None


def test_jitter_without_strength_changes_nothing():
  image = np.random.default_rng(0).random((4, 5, 3), np.float32)
  nothing = dict.fromkeys(['brightness', 'contrast', 'saturation', 'hue'], 0.0)
  jitter = jax.jit(functools.partial(data.random_color_jitter, **nothing))
  out = jitter(jax.random.key(3), image)
  np.testing.assert_allclose(out, image, atol=1e-7)


def test_jitter_keeps_bfloat16_close_to_float32():
  image = np.random.default_rng(0).random((8, 8, 3), np.float32)
  arguments = (np.array([2, 3, 0, 1]), 1.2, 0.8, 1.3, 0.05)
  full = _jitter_reference(image, *arguments)
  half = jax.jit(data.jitter_colors)(jnp.asarray(image, jnp.bfloat16), *arguments)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(np.float32), full, atol=0.05)


def test_contrast_brightness_is_affine_with_uniform_factors():
  image = np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4, 1)
  keys = jax.random.split(jax.random.key(0), 1000)
  out = np.asarray(
    jax.jit(jax.vmap(data.random_contrast_brightness, (0, None)))(keys, image), np.float64
  )
  scale = (out[:, 2, 3, 0] - out[:, 0, 0, 0]) / 4
  shift = out.mean(axis=(1, 2, 3))
  np.testing.assert_allclose(
    out, scale[:, None, None, None] * image + shift[:, None, None, None], atol=1e-5
  )
  for values, low, high in ((scale, 0.6, 1.4), (shift, -0.4, 0.4)):
    assert low - 1e-5 <= values.min() < low + 0.01 and high - 0.01 < values.max() <= high + 1e-5
  assert abs(np.corrcoef(scale, shift)[0, 1]) < 0.1


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda k, x: data.random_color_jitter(k, x, hue=0.6), 'hue is 0.6'),
    (lambda k, x: data.random_color_jitter(k, x, contrast=-0.1), 'contrast is -0.1'),
    (lambda k, x: data.random_color_jitter(k, x[..., :2]), '2 channels, expected 1'),
    (lambda k, x: data.random_contrast_brightness(k, x, contrast=(2, 1)), r'contrast is \(2, 1\)'),
  ],
)
def test_bad_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(jax.random.key(0), jnp.zeros((4, 4, 3)))
