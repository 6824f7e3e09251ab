import numpy as np
import pytest

from jaxlab import localization


def blobs(*squares, size=16, ground=0.0):
  score = np.full((size, size), ground)
  for y0, y1, x0, x1, value in squares:
    score[y0:y1, x0:x1] = value
  return score


TWO = blobs((1, 4, 1, 5, 1.0), (8, 14, 10, 13, 0.8))


def test_tight_boxes_are_those_of_the_components_the_best_first():
  found = localization.coarse_boxes(TWO, 64, expand=1, min_side=0.1)
  # Mean times root of cells: 0.8 x sqrt(18) = 3.39 against 1.0 x sqrt(12) = 3.46.
  np.testing.assert_array_equal(found, [[4, 4, 20, 16], [40, 32, 52, 56]])


def test_the_short_side_grows_to_the_aspect_and_both_to_the_least_side():
  wide = blobs((7, 8, 2, 14, 1.0))  # 48 x 4 pixels at (8, 28)
  np.testing.assert_array_equal(localization.coarse_boxes(wide, 64, expand=1), [[8, 18, 56, 42]])
  small = blobs((7, 9, 7, 9, 1.0), size=16)
  found = localization.coarse_boxes(small, 64, expand=1, least=0.01, min_side=0.25)
  np.testing.assert_array_equal(found, [[24, 24, 40, 40]])


def test_components_that_are_too_large_are_split():
  joined = blobs((4, 8, 2, 14, 0.5), (4, 8, 2, 6, 1.0), (4, 8, 10, 14, 1.0))
  whole = localization.coarse_boxes(joined, 64, expand=1, big=0.3)
  np.testing.assert_array_equal(whole, [[8, 12, 56, 36]])  # 48 x 16 pixels, brought to 2:1
  # The mean is 40 / 256: 0.5 is above 3 of them, 1.0 above 6.
  apart = localization.coarse_boxes(joined, 64, expand=1, big=0.1, rounds=12)
  np.testing.assert_array_equal(apart, [[8, 16, 24, 32], [40, 16, 56, 32]])
  too_few = localization.coarse_boxes(joined, 64, expand=1, big=0.1, rounds=2)
  np.testing.assert_array_equal(too_few, whole)


def test_nothing_above_the_mean_is_the_whole_image():
  np.testing.assert_array_equal(
    localization.coarse_boxes(np.ones((7, 7)), (20, 30)), [[0, 0, 30, 20]]
  )
  dust = blobs((3, 4, 3, 4, 1.0))
  np.testing.assert_array_equal(localization.coarse_boxes(dust, 32, least=0.1), [[0, 0, 32, 32]])


def test_the_whole_image_is_added_behind_all_others_and_once():
  plain = localization.coarse_boxes(TWO, (48, 64), max_boxes=2)
  found = localization.coarse_boxes(TWO, (48, 64), max_boxes=2, include_full=True)
  np.testing.assert_array_equal(found, [*plain, [0, 0, 64, 48]])
  flat = localization.coarse_boxes(np.ones((7, 7)), (20, 30), include_full=True)
  np.testing.assert_array_equal(flat, [[0, 0, 30, 20]])
  large = blobs((1, 15, 1, 15, 1.0))
  found = localization.coarse_boxes(large, 64, big=0.9, include_full=True)
  np.testing.assert_array_equal(found, [[0, 0, 64, 64]])


def test_at_most_as_many_boxes_are_kept():
  found = localization.coarse_boxes(TWO, 64, max_boxes=1)
  assert len(found) == 1


def test_boxes_grow_about_their_center_and_stay_in_the_image():
  np.testing.assert_array_equal(
    localization.expand_box([2, 4, 12, 8], 1.4, (12, 20)), [0, 3, 14, 9]
  )
  np.testing.assert_array_equal(localization.expand_box([0, 0, 5, 5], 1.2, (10, 10)), [0, 0, 6, 6])
  np.testing.assert_array_equal(localization.expand_box([3, 3, 8, 7], 1, (10, 10)), [3, 3, 8, 7])
  # What would lie beyond the border is cut off behind all that enlarges.
  for options, expected in (({'min_side': 20}, [0, 0, 12, 12]), ({'max_aspect': 1}, [0, 0, 12, 7])):
    box = [0, 0, 4, 4] if 'min_side' in options else [0, 0, 12, 2]
    np.testing.assert_array_equal(localization.expand_box(box, 1, (100, 100), **options), expected)
  for box in ([3, 3, 3, 7], [8, 3, 4, 7], [-1, 0, 4, 4], [5, 5, 11, 9]):
    with pytest.raises(ValueError, match='within 10x10 pixels'):
      localization.expand_box(box, 1.2, (10, 10))
  with pytest.raises(ValueError, match='factor'):
    localization.expand_box([3, 3, 8, 7], 0.5, (10, 10))


def test_of_overlapping_boxes_the_best_stays_and_ties_go_by_place():
  boxes = [[0, 0, 10, 10], [0, 1, 10, 11], [20, 5, 30, 15], [20, 0, 30, 4], [2, 0, 9, 3]]
  kept = localization.nms(boxes, [0.5, 0.9, 0.7, 0.7, 0.7], 0.5)
  np.testing.assert_array_equal(kept, [1, 4, 3, 2])
  assert localization.nms([], [], 0.5).size == 0


def test_quality_counts_objects():
  boxes = [np.array([[0, 0, 10, 10], [20, 20, 30, 30]]), np.array([[0, 0, 40, 40]])]
  truth = [
    np.array([[0, 0, 10, 8], [30, 30, 40, 40]]),
    np.array([[5, 5, 10, 10], [35, 35, 45, 45]]),
  ]
  found = localization.box_quality(boxes, truth)
  assert found['recall_0.3'] == 0.25 and found['recall_0.5'] == 0.25
  assert found['coverage'] == pytest.approx((1 + 0 + 1 + 0.25) / 4)
  # Centers at (5, 4), (35, 35), (7.5, 7.5) and (40, 40).
  assert found['objects'] == pytest.approx((1 + 0 + 1) / 3)
  assert found['boxes'] == 1.5
  with pytest.raises(ValueError, match='at least one box'):
    localization.box_quality([np.zeros((0, 4))], [np.zeros((0, 4))])


@pytest.mark.parametrize(
  'wrong', [{'factor': 0}, {'expand': 0.9}, {'max_boxes': 0}, {'max_iou': 0}, {'max_aspect': 0.5}]
)
def test_values_out_of_their_range_are_named(wrong):
  ((name, value),) = wrong.items()
  with pytest.raises(ValueError, match=f'{name}={value}'):
    localization.coarse_boxes(TWO, 64, **wrong)
  with pytest.raises(ValueError, match='finite'):
    localization.coarse_boxes(np.array([[0, np.nan]]), 64)


def test_small_boxes_are_enlarged_behind_the_choice_among_those_that_overlap():
  score = np.zeros((20, 20))
  score[9:11, 7:9], score[9:11, 10:12] = 1.0, 0.9
  found = localization.coarse_boxes(score, 20, least=0.005, expand=1.0, min_side=0.6)
  np.testing.assert_array_equal(found, [[2, 4, 14, 16], [5, 4, 17, 16]])  # of IoU 0.6
  assert len(localization.coarse_boxes(score, 20, least=0.005, expand=1.0, max_boxes=1)) == 1
