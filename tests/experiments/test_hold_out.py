"""Records that are held out: of every class its share, drawn by the seed, or the last of a split."""

import numpy as np
import pytest

from experiments.protocols.hold_out import held_out_rows


def test_every_class_gives_its_share_of_a_list_in_the_order_of_classes():
  labels = np.repeat(np.arange(6), [10, 10, 20, 20, 40, 1])
  kept, held = held_out_rows(labels, 20, 'by_class', 0)
  np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(101))
  assert len(held) == 20
  counts = np.bincount(labels[held], minlength=6)
  assert np.all(np.abs(counts - np.array([10, 10, 20, 20, 40, 1]) * 20 / 101) < 1)
  assert set(labels[kept]) == set(range(6))
  again, other = (held_out_rows(labels, 20, 'by_class', seed)[1] for seed in (0, 1))
  np.testing.assert_array_equal(held, again)
  assert set(held) != set(other)


def test_the_last_records_are_a_split_unless_they_are_of_other_classes():
  labels = np.arange(1000) % 7
  kept, held = held_out_rows(labels, 200, 'last', 0)
  np.testing.assert_array_equal(kept, np.arange(800))
  np.testing.assert_array_equal(held, np.arange(800, 1000))
  with pytest.raises(ValueError, match=r"held_out=200: 100 % .* held_out_order='by_class'"):
    held_out_rows(np.repeat(np.arange(50), 20), 200, 'last', 0)
