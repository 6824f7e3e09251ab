import io

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxlab import data


def _photo(height, width):
  y, x = np.mgrid[:height, :width]
  image = np.stack([y * 255 / height, x * 255 / width, (y + x) % 256 / 2], axis=-1)
  return image.astype(np.uint8)


def _encode(image, kind, **options):
  file = io.BytesIO()
  Image.fromarray(image).save(file, kind, **options)
  return file.getvalue()


def test_lossless_bytes_are_decoded_to_rgb():
  image = _photo(7, 9)
  np.testing.assert_array_equal(data.decode_image(_encode(image, 'PNG')), image)
  gray = data.decode_image(_encode(image[..., 0], 'PNG'))
  np.testing.assert_array_equal(gray, np.repeat(image[..., :1], 3, axis=-1))


@pytest.mark.parametrize('shape', [(60, 90), (91, 60), (64, 64)])
def test_evaluation_rule_is_resize_of_the_shorter_side_and_center_crop(shape):
  image = _photo(*shape)
  record = {'image': _encode(image, 'PNG'), 'label': np.int32(1), 'index': np.int32(0)}
  result = data.DecodeImage(size=28, resize=32)(record)
  height, width = (
    (32, int(32 * shape[1] / shape[0]))
    if shape[0] <= shape[1]
    else (int(32 * shape[0] / shape[1]), 32)
  )
  resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
  top, left = round((height - 28) / 2), round((width - 28) / 2)
  np.testing.assert_array_equal(result['image'], resized[top : top + 28, left : left + 28])
  assert result['label'] == 1
  same = data.DecodeImage(size=28, resize=32)({'image': image})['image']
  np.testing.assert_array_equal(same, result['image'])


def _resize_then_cut(image, size, resize, interpolation):
  height, width = image.shape[:2]
  if width <= height:
    height, width = int(resize * height / width), resize
  else:
    height, width = resize, int(resize * width / height)
  kind = Image.Resampling[interpolation.upper()]
  picture = (
    Image.fromarray(image).resize((width, image.shape[0]), kind).resize((width, height), kind)
  )
  top, left = round((height - size) / 2), round((width - size) / 2)
  return np.asarray(picture)[top : top + size, left : left + size]


_SHAPES = st.tuples(st.integers(20, 200), st.integers(20, 200))
_CUTS = st.tuples(st.integers(1, 64), st.integers(0, 40)).map(lambda cut: (cut[0], sum(cut)))


@settings(max_examples=60, deadline=None)
@given(shape=_SHAPES, cut=_CUTS, interpolation=st.sampled_from(['bilinear', 'bicubic']))
@example(shape=(375, 500), cut=(224, 256), interpolation='bilinear')
@example(shape=(500, 375), cut=(224, 256), interpolation='bicubic')
@example(shape=(500, 500), cut=(224, 256), interpolation='bilinear')
@example(shape=(95, 21), cut=(10, 13), interpolation='bilinear')
@example(shape=(21, 20), cut=(20, 40), interpolation='bilinear')
@example(shape=(333, 500), cut=(256, 256), interpolation='bicubic')
def test_what_is_not_resized_leaves_the_pixels_as_they_are(shape, cut, interpolation):
  image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  expected = _resize_then_cut(image, *cut, interpolation)
  transform = data.DecodeImage(*cut, interpolation=interpolation)
  np.testing.assert_array_equal(transform({'image': image})['image'], expected)
  draft = data.DecodeImage(*cut, interpolation=interpolation, draft=True)({'image': image})['image']
  # Each pass rounds; bicubic weights beyond 0..1 can carry the first one's gray level to two.
  assert np.abs(draft.astype(int) - expected).max() <= 2


def test_draft_mode_moves_few_pixels_of_an_image_that_is_not_reduced():
  image = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
  exact = data.DecodeImage(224, 256)({'image': image})['image']
  draft = data.DecodeImage(224, 256, draft=True)({'image': image})['image']
  assert (draft != exact).mean() < 0.01


def test_only_what_is_kept_is_resized(monkeypatch):
  made = []
  resize = Image.Image.resize

  def spy(picture, size, *args, **options):
    made.append(size)
    return resize(picture, size, *args, **options)

  monkeypatch.setattr(Image.Image, 'resize', spy)
  image = _photo(375, 500)
  for transform in (data.DecodeImage(224, 256), data.DecodeImage(224, 256, draft=True)):
    assert transform({'image': image})['image'].shape == (224, 224, 3)
  assert made == [(341, 335), (224, 224), (224, 335), (224, 224)]


def test_decoded_images_can_be_written_to():
  jpeg = _encode(_photo(60, 80), 'JPEG')
  assert data.decode_image(jpeg).flags.writeable
  assert data.DecodeImage(28, 32)({'image': jpeg})['image'].flags.writeable


def test_draft_mode_gives_nearly_the_same_pixels():
  jpeg = _encode(_photo(512, 640), 'JPEG', quality=95)
  record = {'image': jpeg, 'index': 0}
  full = data.DecodeImage(56, 64)(record)['image'].astype(int)
  fast = data.DecodeImage(56, 64, draft=True)(record)['image'].astype(int)
  assert data.decode_image(jpeg, draft=64).shape == (64, 80, 3)
  assert full.shape == fast.shape == (56, 56, 3)
  assert 0 < np.abs(full - fast).mean() < 3


def test_gray_arrays_keep_their_channel():
  assert data.DecodeImage(8)({'image': _photo(16, 20)[..., :1]})['image'].shape == (8, 8, 1)


def test_bad_input_is_named():
  with pytest.raises(ValueError, match='record 3: cannot decode an image of 9 bytes'):
    data.DecodeImage(8)({'image': b'no image!', 'index': 3})
  jpeg = _encode(_photo(64, 64), 'JPEG')
  with pytest.raises(ValueError, match='cannot decode'):
    data.decode_image(jpeg[: len(jpeg) // 2])
  with pytest.raises(ValueError, match='size 32 is larger than the resized image of side 28'):
    data.DecodeImage(32, 28)
  with pytest.raises(ValueError, match='expected bytes or uint8 HWC'):
    data.DecodeImage(8)({'image': np.zeros((9, 9, 3), np.float32)})


def test_gray_levels_of_16_bits_are_scaled_and_unknown_ranges_refused():
  levels = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
  for kind in ('PNG', 'TIFF'):
    decoded = data.decode_image(_encode(levels, kind))
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 0, 1, 1, 128, 255])
    assert decoded.shape == (1, 6, 3)
  with pytest.raises(ValueError, match='pixels are floats of an unknown range'):
    data.decode_image(_encode(np.full((2, 2), 0.5, np.float32), 'TIFF'))
  with pytest.raises(ValueError, match='pixels are 32-bit integers of an unknown range'):
    data.decode_image(_encode(np.full((2, 2), 70000, np.int32), 'TIFF'))


def test_decompression_bombs_are_a_clear_error(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 8)
  with pytest.raises(ValueError, match=r'record 3: cannot decode an image of .*decompression bomb'):
    data.DecodeImage(8)({'image': _encode(_photo(16, 16), 'PNG'), 'index': 3})


def test_stretching_keeps_no_aspect():
  image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
  found = data.DecodeImage(20, stretch=True)({'image': image})['image']
  expected = Image.fromarray(image).resize((20, 20), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(found, np.asarray(expected))
  cut = data.DecodeImage(20, resize=25, stretch=True)({'image': image})['image']
  whole = Image.fromarray(image).resize((25, 25), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(cut, np.asarray(whole)[2:22, 2:22])
