import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab import localization


@golden('tobias', 'scda_localization')
def test_boxes_from_features_agree_with_official_code(vectors):
  size, truth = vectors.param('image_size'), vectors['in_gt_boxes_xyxy']
  score = localization.channel_sum(vectors['in_feature_maps_nhwc'])
  assert_close(score, vectors['out_score_maps'], 1e-6)
  masks = localization.threshold_mask(score)
  np.testing.assert_array_equal(masks, vectors['out_threshold_masks'])
  largest = [localization.largest_component(mask) for mask in masks]
  np.testing.assert_array_equal(largest, vectors['out_largest_component'])
  boxes = localization.scda_boxes(score, size)
  np.testing.assert_array_equal(boxes, vectors['out_boxes_xyxy'])
  iou = localization.box_iou(boxes, truth)
  assert_close(iou, vectors['out_iou'], 1e-6)
  assert localization.corloc(iou) == pytest.approx(vectors['out_corloc_05'].item())
  # The same boxes by class: the mean of the classes' shares.
  assert localization.corloc(iou, np.arange(len(iou)) % 3) == pytest.approx(
    np.mean([np.mean(vectors['out_iou'][k::3] > 0.5) for k in range(3)])
  )


@golden('tobias', 'score_map_pooling')
def test_scores_of_cells_agree_with_official_code(vectors):
  features = vectors['in_feature_maps_nchw'].transpose(0, 2, 3, 1)
  score = jax.jit(localization.patch_score_map)(features)
  assert_close(score, vectors['out_score_map'], 1e-6)
  for channel in range(features.shape[-1]):
    own = localization.patch_score_map(features[..., channel : channel + 1])
    assert_close(own, vectors['out_pooled_nchw'][:, channel], 1e-6)


def test_the_largest_component_is_the_first_met_of_equals():
  mask = np.array([[0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 1]], bool)
  found = localization.largest_component(mask)
  np.testing.assert_array_equal(np.argwhere(found), [[0, 2], [0, 3]])
  labels, count = localization.components(mask)
  assert count == 3 and labels[2, 0] == labels[3, 1]  # touch at a corner
  assert localization.components(mask, connectivity=4)[1] == 4
  assert not localization.largest_component(np.zeros((3, 3))).any()
  with pytest.raises(ValueError, match='connectivity=6'):
    localization.components(mask, 6)


@pytest.mark.parametrize('value', [0.0, 0.1, 1 / 3, 1e6])
def test_a_constant_map_has_an_empty_mask_and_the_whole_image_as_box(value):
  score = jnp.full((1, 7, 7), value)
  assert not localization.threshold_mask(score).any()
  np.testing.assert_array_equal(localization.scda_boxes(score, (20, 30)), [[0, 0, 30, 20]])


def test_nan_raises():
  with pytest.raises(ValueError, match='NaN'):
    localization.threshold_mask(np.array([[0, np.nan]]))
  assert not jax.jit(localization.threshold_mask)(np.array([[0, np.nan]])).any()


def test_sides_that_cells_do_not_divide_go_to_the_nearest_cell():
  mask = np.array([[0, 1, 0]], bool)
  box = localization.mask_to_box(mask, (4, 10))  # columns at 0.15, 0.45, ... cells
  columns = [i for i in range(10) if int((i + 0.5) * 3 / 10) == 1]
  np.testing.assert_array_equal(box, [columns[0], 0, columns[-1] + 1, 4])
  with pytest.raises(ValueError, match='finer than the image'):
    localization.mask_to_box(np.eye(9, dtype=bool)[:1], (1, 3))


def test_averages_of_blocks_make_cells():
  features = np.random.default_rng(0).normal(size=(2, 8, 12, 3))
  found = localization.patch_score_map(features, pooling='average')
  for row in range(4):
    for column in range(4):
      block = features[:, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
      expected = block.sum(-1).mean((1, 2))
      np.testing.assert_allclose(found[:, row, column], expected, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match=r'features of 8x8.* needs 6 or 7 a side'):
    localization.patch_score_map(jnp.ones((1, 8, 8, 1)))
  with pytest.raises(ValueError, match='a multiple of 4'):
    localization.patch_score_map(jnp.ones((1, 7, 7, 1)), pooling='average')


def test_the_share_of_a_box_within_a_mask_counts_pixels():
  rng = np.random.default_rng(1)
  masks = rng.random((6, 4, 4)) < 0.5
  first = rng.integers(0, 20, (6, 2))
  boxes = np.concatenate([first, first + rng.integers(1, 12, (6, 2))], 1)
  found = localization.share_inside(boxes, masks, 32)
  for share, mask, (x0, y0, x1, y1) in zip(found, masks, boxes, strict=True):
    pixels = np.kron(mask, np.ones((8, 8)))
    np.testing.assert_allclose(share, pixels[y0:y1, x0:x1].mean(), rtol=1e-5)
