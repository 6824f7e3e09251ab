import re

import numpy as np
import pytest
from golden_vectors import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import data
from jaxlab.data import source_labels, subset
from jaxlab.data.protocols import long_tail


def _labels(counts, seed=0):
  labels = np.repeat(np.arange(len(counts)), counts)
  return np.random.default_rng(seed).permutation(labels)


@golden('long_tail_protocols', 'cifar_lt_counts')
def test_counts_are_the_published_ones(vectors):
  checked = 0
  for name, expected in vectors.items():
    kind, classes, ratio, rest = re.fullmatch(
      r'out_(counts|total)_classes(\d+)_ratio(\d+)_(.*)', name
    ).groups()
    counts_of = long_tail.step_counts if rest == 'step' else long_tail.exponential_counts
    counts = counts_of(int(classes), 50000 // int(classes), float(ratio))
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts if kind == 'counts' else counts.sum(), expected)
    checked += 1
  assert checked


@golden('long_tail_protocols', 'imbalanced_index_selection')
def test_selection_is_the_published_one_in_its_order(vectors):
  targets = vectors['in_targets']
  num_classes = int(targets.max()) + 1
  counts = long_tail.exponential_counts(
    num_classes, len(targets) // num_classes, factor=vectors.param('imb_factor')
  )
  np.testing.assert_array_equal(counts, vectors['out_counts'])
  indices = long_tail.select_imbalanced(targets, counts, vectors.param('seed'))
  np.testing.assert_array_equal(indices, vectors['out_selected_indices'])
  np.testing.assert_array_equal(targets[indices], vectors['out_selected_targets'])


def test_a_factor_is_taken_as_it_is():
  # 1 / (1 / 0.11) is a little less than 0.11, and 100 times that is truncated to 10.
  assert long_tail.exponential_counts(4, 100, factor=0.11).tolist() == [100, 47, 22, 11]
  assert long_tail.step_counts(2, 100, factor=0.11).tolist() == [100, 11]
  np.testing.assert_array_equal(
    long_tail.exponential_counts(10, 5000, factor=0.01), long_tail.exponential_counts(10, 5000, 100)
  )


@golden('btm', 'undersample_counts')
def test_undersampling_leaves_the_reference_counts(vectors):
  labels, cap = _labels(vectors['in_class_counts']), vectors.param('cap')
  indices = long_tail.undersample_indices(np.random.default_rng(0), labels, cap)
  np.testing.assert_array_equal(np.bincount(labels[indices]), vectors['out_subset_counts'])
  assert len(set(indices)) == len(indices)


def test_published_group_sizes_of_cifar100_lt():
  groups = long_tail.shot_groups(long_tail.exponential_counts(100, 500, 100))
  assert [int(groups[name].sum()) for name in ('many', 'medium', 'few')] == [35, 35, 30]


def test_both_bounds_of_the_groups_are_medium():
  groups = long_tail.shot_groups(np.array([101, 100, 20, 19]))
  assert {k: np.flatnonzero(v).tolist() for k, v in groups.items()} == {
    'many': [0], 'medium': [1, 2], 'few': [3]
  }  # fmt: skip
  groups = long_tail.shot_groups(np.array([101, 60, 20, 19]), many=50, few=20)
  assert groups['many'].tolist() == [True, True, False, False]


def test_index_groups_follow_the_descending_counts_and_break_ties_by_class():
  groups = long_tail.index_groups(np.array([5, 9, 5, 1]), (2, 3))
  assert {k: np.flatnonzero(v).tolist() for k, v in groups.items()} == {
    'many': [0, 1], 'medium': [2], 'few': [3]
  }  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
  classes=st.integers(1, 30), head=st.integers(1, 5000), ratio=st.floats(1, 1e4), step=st.booleans()
)
def test_counts_fall_from_the_head_by_the_ratio_or_raise(classes, head, ratio, step):
  counts_of = long_tail.step_counts if step else long_tail.exponential_counts
  if (classes > 1 or step) and int(head * (1 / ratio)) < 1:
    with pytest.raises(ValueError, match='truncates to 0'):
      counts_of(classes, head, ratio)
    return
  counts = counts_of(classes, head, ratio)
  assert (np.diff(counts) <= 0).all()
  assert counts[-1] == (int(head * (1 / ratio)) if classes > 1 or step else head)
  assert classes == 1 or counts[0] == head


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), ratio=st.sampled_from([1.0, 3.0, 10.0]))
def test_own_split_is_long_tailed_in_training_and_balanced_in_test(seed, ratio):
  labels = _labels([40, 35, 30])
  options = {'max_count': 20, 'test_per_class': 8, 'seed': seed}
  train, test = long_tail.split_long_tailed(labels, ratio=ratio, **options)
  expected = long_tail.exponential_counts(3, 20, ratio)
  np.testing.assert_array_equal(np.bincount(labels[train]), expected)
  assert np.bincount(labels[test]).tolist() == [8, 8, 8]
  assert len({*train, *test}) == len(train) + len(test)
  # The same test images whatever the ratio, and training sets within each other.
  balanced, same = long_tail.split_long_tailed(labels, ratio=1, **options)
  np.testing.assert_array_equal(test, same)
  assert {*train} <= {*balanced}
  again, _ = long_tail.split_long_tailed(labels, ratio=ratio, **options)
  np.testing.assert_array_equal(train, again)


def test_balanced_subsets_are_independent_draws_of_one_length():
  labels = _labels([40, 12, 3])
  subsets = long_tail.balanced_subsets(np.random.default_rng(0), labels, 5, 200)
  assert {len(s) for s in subsets} == {13}
  drawn = np.bincount(np.concatenate(subsets), minlength=len(labels))
  assert (drawn[labels == 2] == 200).all()
  # Every image of the head is as likely as any other: 5 of 40, 200 times.
  assert abs(drawn[labels == 0].mean() - 25) < 1e-9
  assert drawn[labels == 0].min() > 8 and drawn[labels == 0].max() < 45
  first = long_tail.balanced_subsets(np.random.default_rng(0), labels, 5, 1)[0]
  np.testing.assert_array_equal(first, subsets[0])


def _source(n=12):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (n, 2, 2, 1), np.uint8)
  return data.InMemory({'image': images, 'label': np.arange(n) % 3}, class_names='abc')


class _Lazy:
  num_classes, class_names = 3, ('a', 'b', 'c')

  def __init__(self):
    self.reads = []

  def __len__(self):
    return 12

  def __getitem__(self, index):
    self.reads.append(index)
    return _source()[index]


def test_subset_holds_the_records_at_its_indices_in_memory_and_lazily():
  indices, lazy = np.array([7, 2, 2, 11]), _Lazy()
  memory, view = subset(_source(), indices), subset(lazy, indices)
  assert hasattr(memory, 'gather') and not lazy.reads
  for source in (memory, view):
    assert len(source) == 4 and source.num_classes == 3 and source.class_names == ('a', 'b', 'c')
    records = [source[i] for i in range(4)]
    assert [int(r['index']) for r in records] == [0, 1, 2, 3]
    for record, i in zip(records, indices):
      np.testing.assert_array_equal(record['image'], _source()[i]['image'])
      assert record['label'] == i % 3
  assert lazy.reads == [7, 2, 2, 11]
  nested = subset(view, [3, 0])
  assert int(nested[0]['label']) == 11 % 3 and int(nested[0]['index']) == 0


def test_source_labels_are_those_of_the_records():
  expected = np.arange(12) % 3
  lazy = _Lazy()
  for source in (_source(), lazy):
    labels = source_labels(source)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, expected)
  lazy.labels = expected[::-1]
  np.testing.assert_array_equal(source_labels(lazy), expected[::-1])
  view = subset(lazy, np.array([0, 5]))
  np.testing.assert_array_equal(source_labels(view), expected[::-1][[0, 5]])
  assert len(lazy.reads) == 12


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: long_tail.exponential_counts(10, 100, 0.01), 'ratio is 0.01, expected a number >= 1'),
    (lambda: long_tail.step_counts(10, 100, float('nan')), 'ratio is nan'),
    (lambda: long_tail.step_counts(10, 100, factor=1.5), r'factor is 1.5, expected .* \(0, 1\]'),
    (lambda: long_tail.exponential_counts(10, 100, factor=float('nan')), 'factor is nan'),
    (lambda: long_tail.exponential_counts(10, 100), 'ratio is None, factor is None'),
    (lambda: long_tail.step_counts(10, 100, 2, factor=0.5), 'expected one of them'),
    (lambda: long_tail.step_counts(4, 50, factor=0.01), 'max_count 50 at ratio 100 truncates to 0'),
    (
      lambda: long_tail.exponential_counts(10, 50, 100),
      r'classes 8, 9 have no images: max_count 50 .* ratio below 50',
    ),
    (lambda: long_tail.step_counts(4, 50, 100), 'classes 2, 3 have no images'),
    (lambda: long_tail.exponential_counts(0, 50, 1), 'num_classes is 0'),
    (lambda: long_tail.class_counts(np.array([0, 2])), 'class 1 has no images among 2 labels'),
    (lambda: long_tail.class_counts(np.array([0, 1]), 4), 'classes 2, 3 have no images'),
    (lambda: long_tail.class_counts(np.array([0, 4]), 4), r'1 labels are out of range 0\.\.3'),
    (lambda: long_tail.class_counts(np.zeros(3)), 'label has dtype float64'),
    (lambda: long_tail.class_counts(np.zeros(0, int)), 'expected a non-empty vector'),
    (
      lambda: long_tail.select_imbalanced(np.array([0, 0, 1]), np.array([2, 2])),
      'class 1 has 1 images, counts ask for 2',
    ),
    (lambda: long_tail.select_imbalanced(np.array([0, 1]), np.array([2, 0])), 'integers >= 1'),
    (
      lambda: long_tail.split_long_tailed(
        _labels([9, 9]), max_count=5, ratio=1, test_per_class=5
      ),
      'class 0 has 9 images, test_per_class 5 and the training counts need 10',
    ),
    (
      lambda: long_tail.split_long_tailed(
        _labels([9, 9]), max_count=5, ratio=1, test_per_class=5, num_classes=3
      ),
      'class 2 has no images',
    ),
    (
      lambda: long_tail.split_long_tailed(
        _labels([9, 9]), max_count=5, ratio=1, test_per_class=0
      ),
      'test_per_class is 0',
    ),
    (lambda: long_tail.shot_groups(np.arange(4), many=2, few=4), r'expected few <= many \+ 1'),
    (lambda: long_tail.index_groups(np.arange(4), (3, 2)), r'boundaries are \(3, 2\)'),
    (lambda: long_tail.index_groups(np.arange(4), (3, 5)), r'boundaries are \(3, 5\)'),
    (lambda: long_tail.undersample_indices(None, _labels([3, 3]), 0), 'cap is 0'),
    (lambda: long_tail.undersample_indices(None, _labels([3, 0, 3]), 2), 'class 1 has no images'),
    (lambda: long_tail.balanced_subsets(None, _labels([3, 3]), 2, 0), 'num_subsets is 0'),
    (lambda: subset(_source(), np.array([0, 12])), 'from 0 to 12, but source has 12'),
    (lambda: subset(_source(), np.array([-1])), 'from -1 to -1'),
    (lambda: subset(_source(), []), 'expected a non-empty vector of integers'),
  ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_empty_classes_are_counted_when_allowed():
  counts = long_tail.class_counts(np.array([0, 2, 2]), 4, allow_empty=True)
  assert counts.tolist() == [1, 0, 2, 0]
