import numpy as np
import pytest
from scipy.stats import chisquare

from jaxlab.data import sample_subset, sample_tiny_set

LABELS = np.random.default_rng(0).permutation(np.repeat([2, 5, 6, 9], [9, 7, 8, 12]))


def draw(seed=0, **options):
  return sample_subset(np.random.default_rng(seed), LABELS, **options)


def test_a_total_is_drawn_uniformly_without_duplicates():
  drawn = np.stack([draw(seed, total=6) for seed in range(2000)])
  assert all(len({*row}) == 6 for row in drawn)
  counts = np.bincount(drawn.ravel(), minlength=len(LABELS))
  assert len(counts) == 36 and chisquare(counts).pvalue > 1e-3
  np.testing.assert_array_equal(np.sort(draw(total=36)), np.arange(36))


def test_each_class_gives_as_many():
  drawn = draw(per_class=7)
  assert len({*drawn}) == 28
  np.testing.assert_array_equal(LABELS[drawn], np.repeat([2, 5, 6, 9], 7))


@pytest.mark.parametrize('count', [{'total': 12}, {'per_class': 4}])
def test_few_classes_give_as_many_each(count):
  seen = set()
  for seed in range(20):
    drawn = draw(seed, num_classes=3, **count)
    classes, counts = np.unique(LABELS[drawn], return_counts=True)
    assert len({*drawn}) == 12 and counts.tolist() == [4, 4, 4]
    seen |= {tuple(classes)}
  assert len(seen) == 4  # of 4 classes 3


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'total': 37}, 'total=37 exceeds the 36 images'),
    ({'per_class': 8}, 'num_shots 8'),
    ({'num_classes': 5, 'total': 5}, 'num_classes=5 exceeds the 4 classes'),
    ({'num_classes': 3, 'total': 10}, 'total=10 does not divide over num_classes=3'),
    ({'num_classes': 4, 'total': 32}, 'num_shots 8'),
    ({}, 'expected one of the two'),
    ({'total': 3, 'per_class': 1}, 'expected one of the two'),
    ({'total': 0}, 'total=0: expected at least 1'),
    ({'total': 2, 'num_classes': 0}, 'num_classes=0: expected at least 1'),
  ],
)
def test_impossible_subsets_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    draw(**options)


def test_tiny_sets_draw_classes_alike_however_large_they_are():
  labels = np.repeat(np.arange(20), [500, 5] * 10)
  rows = [sample_tiny_set(np.random.default_rng(seed), labels, 10) for seed in range(400)]
  assert all(len({*row}) == 10 for row in rows)
  assert chisquare(np.bincount(labels[np.concatenate(rows)], minlength=20)).pvalue > 1e-3
  each = sample_tiny_set(np.random.default_rng(0), labels, 60)
  np.testing.assert_array_equal(np.bincount(labels[each]), 3)
  # A class that is used up is passed over.
  few = np.array([0, *[1] * 9, *range(2, 12)])
  assert len({*sample_tiny_set(np.random.default_rng(0), few, 11)}) == 11


@pytest.mark.parametrize(
  ('total', 'message'),
  [(0, 'total=0: expected 1 to 36'), (37, 'total=37'), (6, 'no multiple of the 4 classes')],
)
def test_tiny_sets_that_cannot_be_drawn_are_refused(total, message):
  with pytest.raises(ValueError, match=message):
    sample_tiny_set(np.random.default_rng(0), LABELS, total)


def test_tiny_sets_of_a_source_are_those_of_its_labels_and_few_records_are_read():
  class Read:
    num_classes, count = 10, 0

    def __len__(self):
      return 10_000

    def __getitem__(self, index):
      self.count += 1
      return {'label': np.int32(index % 10)}

  source, labels = Read(), np.arange(10_000) % 10
  for total in (7, 20):
    drawn = [sample_tiny_set(np.random.default_rng(0), own, total) for own in (source, labels)]
    np.testing.assert_array_equal(*drawn)
  assert source.count < 400
  short = np.array([0] * 9 + [1])
  with pytest.raises(ValueError, match='class 1 has fewer than its 2 images'):
    sample_tiny_set(np.random.default_rng(0), short, 4)
