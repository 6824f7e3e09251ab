import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import golden

from jaxlab import data

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 8, 16, 3), np.uint8)
SCORES = RNG.normal(size=(5, 4, 4)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(3), 5)


def cells(image, grid=4):
  """Returns the cells of an image as a list, in raster order."""
  return [part for row in np.split(image, grid) for part in np.split(row, grid, axis=1)]


@golden('tobias', 'score_map_pooling')
def test_the_upper_half_of_the_cells_agrees_with_official_code(vectors):
  foreground, background = data.split_cells(vectors['out_score_map'])
  mask = vectors['out_foreground_mask'].reshape(-1, 16)
  for kept, rest, expected in zip(foreground, background, mask, strict=True):
    np.testing.assert_array_equal(np.sort(kept), np.flatnonzero(expected))
    np.testing.assert_array_equal(np.sort(rest), np.flatnonzero(~expected))


@golden('tobias', 'merge_foreground_background')
def test_a_merged_image_agrees_with_official_code(vectors):
  foreground, _ = data.split_cells(vectors['in_score_map_a'])
  _, background = data.split_cells(vectors['in_score_map_b'])
  for found, expected in (
    (foreground, vectors['out_foreground_cells_a']),
    (background, vectors['out_background_cells_b']),
  ):
    np.testing.assert_array_equal(np.stack(np.divmod(found, 4), -1), expected)
  merged = jax.jit(data.merge_background)(
    vectors['in_image_a_hwc'], vectors['in_image_b_hwc'],
    foreground, background, vectors['in_background_permutation'],
  )  # fmt: skip
  assert merged.dtype == jnp.uint8
  np.testing.assert_array_equal(merged, vectors['out_image_hwc'])


def test_equal_scores_stay_in_raster_order():
  foreground, background = data.split_cells(np.zeros((3, 3)), 4)
  assert foreground.tolist() == [0, 1, 2, 3] and background.tolist() == [4, 5, 6, 7, 8]


def test_changed_images_hold_their_objects_and_all_background_cells_of_one_other_image():
  found = np.asarray(jax.jit(data.change_backgrounds, static_argnums=3)(KEYS, IMAGES, SCORES, 1.0))
  partners = set()
  for own, image, score in zip(found, IMAGES, SCORES, strict=True):
    order = np.argsort(-score.ravel(), kind='stable')
    got, before = cells(own), cells(image)
    for cell in order[:8]:
      np.testing.assert_array_equal(got[cell], before[cell])
    filled = sorted(got[cell].tobytes() for cell in order[8:])
    matches = [
      index
      for index, (other, own_score) in enumerate(zip(IMAGES, SCORES, strict=True))
      if filled
      == sorted(
        cells(other)[c].tobytes() for c in np.argsort(-own_score.ravel(), kind='stable')[8:]
      )
    ]
    assert len(matches) == 1
    partners |= {*matches}
  assert len(partners) > 1


@pytest.mark.exhaustive
def test_without_scores_any_half_stays_and_any_half_is_taken():
  keys = jax.random.split(jax.random.key(0), 400)
  images = np.arange(400 * 16, dtype=np.int32).reshape(
    400, 4, 4, 1
  )  # a pixel a cell, all different
  found = np.asarray(data.change_backgrounds(keys, images, None, 1.0))[..., 0].reshape(400, 16)
  own = np.arange(400)[:, None]
  stayed = found == images.reshape(400, 16)
  others = np.where(found // 16 == own, -1, found % 16)
  assert np.all(stayed.sum(1)[(found // 16 != own).any(1)] == 8)
  # A cell stays in half of the images, a cell is taken in half of them: 4 deviations of a binomial.
  spread = 4 * np.sqrt(0.25 / 400)
  np.testing.assert_allclose(stayed.mean(0), 0.5, atol=spread)
  taken = np.array([(others == cell).sum() for cell in range(16)]) / 400
  np.testing.assert_allclose(taken, 0.5, atol=spread)


@pytest.mark.exhaustive
def test_the_share_of_changed_images_is_the_probability():
  keys = jax.random.split(jax.random.key(1), 1000)
  images = np.arange(1000 * 16, dtype=np.int32).reshape(1000, 4, 4, 1)
  scores = np.zeros((1000, 4, 4), np.float32)
  found = data.change_backgrounds(keys, images, scores, 0.3)
  changed = np.any(np.asarray(found) != images, axis=(1, 2, 3)).mean()
  assert abs(changed - 0.3) < 4 * np.sqrt(0.21 / 1000)
  np.testing.assert_array_equal(data.change_backgrounds(keys, images, scores, 0.0), images)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: data.split_cells(np.zeros((3, 3))), '9 cells have no half'),
    (lambda: data.split_cells(np.zeros((4, 4)), 16), 'num_foreground=16: expected 1 to 15'),
    (lambda: data.change_backgrounds(KEYS, IMAGES, SCORES, 1.5), r'probability=1.5'),
    (lambda: data.change_backgrounds(KEYS, IMAGES, SCORES[:2], 0.5), 'a map an image'),
    (lambda: data.change_backgrounds(KEYS, IMAGES, None, 0.5, grid=3), '9 cells have no half'),
    (
      lambda: data.change_backgrounds(KEYS, IMAGES[:, :6], SCORES, 0.5),
      'a grid of 4x4 does not divide an image of 6x16',
    ),
    (
      lambda: data.merge_background(
        IMAGES[0], IMAGES[1, :4], jnp.arange(8), jnp.arange(8), np.arange(8)
      ),
      'of one shape and dtype',
    ),
    (
      lambda: data.merge_background(
        IMAGES[0], IMAGES[1], jnp.arange(8), jnp.arange(7), np.arange(7)
      ),
      '8 foreground and 7 background cells make no square grid',
    ),
  ],
)
def test_what_does_not_fit_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
