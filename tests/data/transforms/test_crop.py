import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxlab import data

KEYS = 400


def _keys(n=KEYS, seed=0):
  return jax.random.split(jax.random.key(seed), n)


def _uniforms(keys):
  """The numbers that a key gives, `[keys, 4, 10]`: area, ratio, top, left."""
  flat = jax.vmap(lambda key: jax.random.uniform(key, (40,)))(keys)
  return np.asarray(flat, np.float64).reshape(-1, 4, 10)


def _is_tie(value):
  return abs(value - math.floor(value) - 0.5) < 1e-4


def _resized_crop_reference(u, height, width, scale, ratio):
  """Torchvision's RandomResizedCrop.get_params, from given numbers; None near a rounding tie."""
  for k in range(10):
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0, k])
    aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[1, k])
    w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
    if _is_tie(w) or _is_tie(h):
      return None
    w, h = round(w), round(h)
    if 0 < w <= width and 0 < h <= height:
      return int(u[2, k] * (height - h + 1)), int(u[3, k] * (width - w + 1)), h, w
  w, h = width, height
  if width / height < ratio[0]:
    h = round(w / ratio[0])
  elif width / height > ratio[1]:
    w = round(h * ratio[1])
  return (height - h) // 2, (width - w) // 2, h, w


def _erasing_reference(u, height, width, scale, ratio):
  for k in range(10):
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0, k])
    aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[1, k])
    h, w = math.sqrt(area * aspect), math.sqrt(area / aspect)
    if _is_tie(w) or _is_tie(h):
      return None
    h, w = round(h), round(w)
    if h < height and w < width:
      return int(u[2, k] * (height - h + 1)), int(u[3, k] * (width - w + 1)), h, w
  return 0, 0, 0, 0


@pytest.mark.parametrize(
  ('draw', 'reference', 'shape', 'scale', 'ratio'),
  [
    (data.draw_resized_crop, _resized_crop_reference, (32, 32), (0.2, 1.0), (3 / 4, 4 / 3)),
    (data.draw_resized_crop, _resized_crop_reference, (17, 60), (0.08, 1.0), (3 / 4, 4 / 3)),
    (data.draw_resized_crop, _resized_crop_reference, (60, 17), (0.9, 1.0), (0.5, 2.0)),
    (data.draw_erasing, _erasing_reference, (32, 24), (0.02, 0.33), (0.3, 3.3)),
    (data.draw_erasing, _erasing_reference, (12, 60), (0.5, 0.9), (0.3, 3.3)),
  ],
)
def test_boxes_follow_torchvisions_rule(draw, reference, shape, scale, ratio):
  keys = _keys()
  boxes = jax.jit(jax.vmap(lambda key: draw(key, *shape, scale, ratio)))(keys)
  expected = [reference(u, *shape, scale, ratio) for u in _uniforms(keys)]
  clear = [i for i, box in enumerate(expected) if box is not None]
  assert len(clear) > 0.95 * KEYS
  np.testing.assert_array_equal(np.asarray(boxes)[clear], np.array([expected[i] for i in clear]))
  assert boxes.dtype == jnp.int32


def test_without_a_fitting_try_the_box_is_central_with_clamped_ratio():
  # A part of the whole area never has a ratio of 1 in these images.
  draw = functools.partial(data.draw_resized_crop, scale=(1.0, 1.0), ratio=(1.0, 1.0))
  wide, high = jax.jit(lambda key: (draw(key, 10, 31), draw(key, 31, 10)))(jax.random.key(0))
  assert wide.tolist() == [0, 10, 10, 10] and high.tolist() == [10, 0, 10, 10]
  nothing = jnp.zeros(4, jnp.int32)  # what draw_erasing gives when no try fits
  image = jnp.ones((8, 8, 1))
  np.testing.assert_array_equal(data.erase(image, nothing, 0.0), image)


def _torch_bilinear(part, size):
  """Bilinear resize without antialias, align_corners=False, one output pixel after another."""
  out = np.zeros((*size, part.shape[-1]))
  for y in range(size[0]):
    for x in range(size[1]):
      sy = max((y + 0.5) * part.shape[0] / size[0] - 0.5, 0)
      sx = max((x + 0.5) * part.shape[1] / size[1] - 0.5, 0)
      y0, x0 = int(sy), int(sx)
      y1, x1 = min(y0 + 1, part.shape[0] - 1), min(x0 + 1, part.shape[1] - 1)
      fy, fx = sy - y0, sx - x0
      out[y, x] = (1 - fy) * ((1 - fx) * part[y0, x0] + fx * part[y0, x1]) + fy * (
        (1 - fx) * part[y1, x0] + fx * part[y1, x1]
      )
  return out


_IMAGE = np.random.default_rng(1).random((23, 19, 3), np.float32)
_RESIZE = {
  kind: jax.jit(functools.partial(data.crop_and_resize, size=(12, 9), **options))
  for kind, options in {
    'pil bilinear': {},
    'pil bicubic': {'interpolation': 'bicubic'},
    'torch bilinear': {'antialias': False},
  }.items()
}


@settings(max_examples=20, deadline=None)
@given(st.data(), st.sampled_from(sorted(_RESIZE)))
def test_cut_and_resize_agrees_with_pil_and_torch_bilinear(draw, kind):
  height, width = draw.draw(st.integers(1, 23)), draw.draw(st.integers(1, 19))
  top, left = draw.draw(st.integers(0, 23 - height)), draw.draw(st.integers(0, 19 - width))
  box = jnp.array([top, left, height, width])
  actual = _RESIZE[kind](_IMAGE, box)
  part = _IMAGE[top : top + height, left : left + width]
  if kind.startswith('pil'):
    planes = [Image.fromarray(np.ascontiguousarray(part[..., c])) for c in range(3)]
    resample = Image.Resampling[kind.removeprefix('pil ').upper()]
    expected = np.stack([np.asarray(p.resize((9, 12), resample)) for p in planes], axis=-1)
    expected = np.clip(expected, 0, 1)  # as of images of 8 bits
  else:
    expected = _torch_bilinear(part, (12, 9))
  np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_resizing_that_does_not_exist_is_refused():
  for options, message in (
    ({'interpolation': 'lanczos'}, 'lanczos'),
    ({'interpolation': 'bicubic', 'antialias': False}, 'takes antialias=True'),
  ):
    with pytest.raises(ValueError, match=message):
      data.crop_and_resize(_IMAGE, jnp.array([0, 0, 5, 5]), 4, **options)


@pytest.mark.parametrize(
  'box',
  [
    *([0, 0, 0, 5], [5, 5, 4, -2], [-1, 0, 5, 5], [0, 15, 5, 5], [19, 0, 5, 5], [30, 30, 4, 4]),
    *([0, 0, 0.5, 5], [0, np.nan, 5, 5]),
  ],
)
def test_a_concrete_box_without_area_or_beyond_the_image_is_refused(box):
  for own in (box, np.array(box), jnp.array(box)):
    with pytest.raises(ValueError, match='at least a pixel, within the 23x19'):
      data.crop_and_resize(_IMAGE, own, 4)
  with pytest.raises(ValueError, match='at least a pixel'):
    jax.jit(lambda image: data.crop_and_resize(image, np.array(box), 4))(_IMAGE)


def test_traced_boxes_are_not_looked_at_and_show_nan_where_there_is_no_pixel():
  crop = jax.jit(functools.partial(data.crop_and_resize, size=4))
  for empty in ([0, 0, 0, 5], [30, 30, 4, 4], [5, 5, 4, -2]):
    assert np.isnan(crop(_IMAGE, jnp.array(empty))).all()
  below = crop(_IMAGE, jnp.array([19, 0, 8, 8]))  # 4 of 8 rows lie within
  assert np.isfinite(below[:2]).all() and np.isnan(below[3]).all()
  both = jax.vmap(lambda box: data.crop_and_resize(_IMAGE, box, 4))
  found = both(jnp.array([[0, 0, 0, 5], [2, 3, 5, 5]]))
  assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()


def test_whole_image_at_its_own_size_is_unchanged():
  whole = jax.jit(functools.partial(data.crop_and_resize, size=(23, 19)))
  out = whole(_IMAGE, jnp.array([0, 0, 23, 19]))
  np.testing.assert_allclose(out, _IMAGE, atol=1e-7)


def test_a_batch_equals_its_images_one_by_one():
  augment = functools.partial(data.random_resized_crop, size=8, scale=(0.2, 1.0))
  images = np.random.default_rng(2).random((5, 12, 14, 3), np.float32)
  keys = _keys(5)
  batch = jax.jit(jax.vmap(augment))(keys, images)
  assert batch.shape == (5, 8, 8, 3)
  one = jax.jit(augment)
  for key, image, row in zip(keys, images, batch):
    np.testing.assert_allclose(one(key, image), row, atol=1e-6)
  low = jax.jit(jax.vmap(augment))(keys, images.astype(jnp.bfloat16))
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(low.astype(np.float32), batch, atol=0.01)


def test_random_crop_shows_each_place_of_the_padded_image():
  image = np.arange(1, 13, dtype=np.float32).reshape(3, 4, 1)
  crops = jax.jit(jax.vmap(lambda key: data.random_crop(key, image, padding=1)))(_keys(200))
  padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
  places = {padded[y : y + 3, x : x + 4].tobytes() for y in range(3) for x in range(3)}
  assert {np.asarray(crop).tobytes() for crop in crops} == places
  small_crop = functools.partial(data.random_crop, size=2, padding=0)
  smaller = jax.eval_shape(small_crop, jax.random.key(0), image)
  assert smaller.shape == (2, 2, 1)


def test_center_crop_rounds_as_torchvision():
  image = np.arange(7 * 6).reshape(7, 6, 1)
  # (7 - 4) / 2 = 1.5 -> 2 and (6 - 3) / 2 = 1.5 -> 2, halves to even.
  np.testing.assert_array_equal(data.center_crop(image, (4, 3)), image[2:6, 2:5])


def test_cutout_is_a_square_cut_off_at_the_borders():
  image = jnp.ones((9, 7, 2))
  cut = jax.jit(jax.vmap(lambda key: data.random_cutout(key, image, side=4)))(_keys(300))
  squares = set()
  for y in range(9):
    for x in range(7):
      expected = np.ones((9, 7, 2), np.float32)
      expected[max(0, y - 2) : y + 2, max(0, x - 2) : x + 2] = 0
      squares.add(expected.tobytes())
  assert {np.asarray(c).tobytes() for c in cut} == squares


def test_random_erasing_erases_with_its_probability_and_value():
  image = jnp.full((16, 16, 1), 0.5)
  erase = functools.partial(data.random_erasing, probability=0.3, value=None)
  out = np.asarray(jax.jit(jax.vmap(lambda key: erase(key, image)))(_keys(600)))
  changed = (out != 0.5).any(axis=(1, 2, 3))
  assert abs(changed.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 600)
  noise = out[out != 0.5]
  assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
  always = jax.jit(lambda key: data.random_erasing(key, image, 1.0, value=0.25))(jax.random.key(1))
  assert set(np.unique(always)) == {0.25, 0.5}


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda k, x: data.center_crop(x, 11), 'crop 11x11 is larger than the image 10x10'),
    (lambda k, x: data.random_crop(k, x, size=15, padding=2), 'larger than the image 14x14'),
    (lambda k, x: data.random_crop(k, x, padding=-1), 'padding is -1'),
    (lambda k, x: data.random_resized_crop(k, x, 0), 'size is 0'),
    (lambda k, x: data.random_resized_crop(k, x, 8, scale=(0.5, 0.2)), r'scale is \(0.5, 0.2\)'),
    (lambda k, x: data.random_resized_crop(k, x, 8, ratio=(0.0, 2.0)), r'ratio is \(0.0, 2.0\)'),
    (lambda k, x: data.random_resized_crop(k, x[None], 8), 'use jax.vmap'),
    (lambda k, x: data.random_resized_crop(k, x.astype(np.uint8), 8), 'convert it with to_float'),
    (lambda k, x: data.random_erasing(k, x, probability=1.1), 'probability is 1.1'),
    (lambda k, x: data.random_cutout(k, x, side=0), 'side is 0'),
  ],
)
def test_bad_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(jax.random.key(0), jnp.zeros((10, 10, 3)))
