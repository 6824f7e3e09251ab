import numpy as np
import pytest
from scipy.stats import chisquare

from jaxlab.data import sample_subset

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
