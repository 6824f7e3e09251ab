import numpy as np
import pytest
from PIL import Image

from jaxlab import data

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 12, 16, 1), np.uint8)
SOURCE = data.InMemory({'image': IMAGES, 'label': np.array([2, 0, 1])})
BOXES = [
  np.array([[0, 0, 8, 8], [4, 2, 16, 12]]),
  np.zeros((0, 4), int),
  np.array([[3, 3, 11, 11]]),
]


def test_crops_are_the_parts_of_their_images_in_order():
  crops = data.Crops(SOURCE, BOXES, 8)
  assert len(crops) == 3
  records = [crops[i] for i in range(3)]
  assert [int(r['origin']) for r in records] == [0, 0, 2]
  assert [int(r['label']) for r in records] == [2, 2, 1]
  np.testing.assert_array_equal(records[0]['image'], IMAGES[0, :8, :8])
  np.testing.assert_array_equal(records[2]['image'], IMAGES[2, 3:11, 3:11])
  part = Image.fromarray(IMAGES[0, 2:12, 4:16, 0]).resize((8, 8), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(records[1]['image'][..., 0], np.asarray(part))


def test_images_are_brought_to_their_form_before_they_are_cut():
  crops = data.Crops(SOURCE, BOXES, 8, data.DecodeImage(24, stretch=True))
  whole = Image.fromarray(IMAGES[2, ..., 0]).resize((24, 24), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(crops[2]['image'][..., 0], np.asarray(whole)[3:11, 3:11])


def test_boxes_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match='boxes of 2 images for a source of 3'):
    data.Crops(SOURCE, BOXES[:2], 8)
  with pytest.raises(ValueError, match='no box in any image'):
    data.Crops(SOURCE, [np.zeros((0, 4))] * 3, 8)
  for box in ([0, 0, 17, 8], [5, 5, 5, 9], [-1, 0, 4, 4]):
    crops = data.Crops(SOURCE, [BOXES[0], np.array([box]), BOXES[2]], 8)
    assert crops[0]['origin'] == 0
    with pytest.raises(ValueError, match=r'crop 2 of image 1.* not within its 12x16 pixels'):
      crops[2]
