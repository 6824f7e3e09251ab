import numpy as np
import pytest

from jaxlab.data import Aligned, InMemory


def source(start, count=4):
  labels = np.arange(start, start + count, dtype=np.int32) % 3
  images = np.full((count, 2, 2, 1), start, np.uint8)
  return InMemory({'image': images, 'label': labels}, 3)


def test_a_batch_has_the_sources_on_its_second_axis():
  both = Aligned([source(0), source(1)])
  batch = both.gather(np.array([2, 0]))
  assert len(both) == 4 and batch['image'].shape == (2, 2, 2, 2, 1)
  np.testing.assert_array_equal(batch['label'], [[2, 0], [0, 1]])
  np.testing.assert_array_equal(both[2]['label'], [2, 0])


def test_sources_that_cannot_be_aligned_are_refused():
  with pytest.raises(ValueError, match=r'one length, got \[3, 4\]'):
    Aligned([source(0), source(0, 3)])
  with pytest.raises(ValueError, match='in memory'):
    Aligned([])
