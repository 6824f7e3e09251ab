import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from jaxlab import data
from jaxlab.data.protocols.few_shot import (
  few_shot_draws,
  few_shot_split,
  sample_episode,
  sample_episodes,
)

# Classes are numbered as in a novel split: not from 0, not contiguous.
LABELS = np.random.default_rng(0).permutation(np.repeat([5, 6, 8, 9], [9, 7, 8, 12]))


@settings(max_examples=40, deadline=None)
@given(
  ways=st.integers(1, 4),
  shots=st.integers(1, 3),
  queries=st.integers(1, 4),
  seed=st.integers(0, 99),
)
def test_episode_lists_disjoint_images_class_by_class(ways, shots, queries, seed):
  episode = sample_episode(np.random.default_rng(seed), LABELS, ways, shots, queries)
  assert len(set(episode.classes)) == ways and {*episode.classes} <= {5, 6, 8, 9}
  used = [*episode.support, *episode.query]
  assert len(set(used)) == ways * (shots + queries)
  np.testing.assert_array_equal(episode.support_labels, np.arange(ways * shots) // shots)
  np.testing.assert_array_equal(episode.query_labels, np.arange(ways * queries) // queries)
  np.testing.assert_array_equal(LABELS[episode.support], episode.classes[episode.support_labels])
  np.testing.assert_array_equal(LABELS[episode.query], episode.classes[episode.query_labels])


def test_episodes_are_reproducible_and_do_not_depend_on_their_number():
  few, many = (sample_episodes(3, LABELS, n, 2, 1, 4) for n in (4, 9))
  assert many.query.shape == (9, 8) and many.classes.shape == (9, 2)
  for a, b in zip(few, many):
    np.testing.assert_array_equal(a, b[:4])
  assert len({tuple(row) for row in many.support}) > 4
  other = sample_episodes(4, LABELS, 4, 2, 1, 4)
  assert (other.support != few.support).any()


def test_classes_and_images_are_drawn_uniformly():
  episodes = sample_episodes(0, LABELS, 3000, 2, 1, 1)
  _, counts = np.unique(episodes.classes, return_counts=True)
  assert chisquare(counts).pvalue > 1e-3
  for name in ('support', 'query'):
    drawn = getattr(episodes, name)
    own = drawn[LABELS[drawn] == 9]
    assert chisquare(np.unique(own, return_counts=True)[1]).pvalue > 1e-3


def test_few_shot_split_takes_as_many_of_every_class():
  indices = few_shot_split(np.random.default_rng(0), LABELS, 3)
  np.testing.assert_array_equal(LABELS[indices], np.repeat([5, 6, 8, 9], 3))
  assert len(set(indices)) == 12
  np.testing.assert_array_equal(indices, few_shot_split(np.random.default_rng(0), LABELS, 3))
  assert (indices != few_shot_split(np.random.default_rng(1), LABELS, 3)).any()


class Lazy:
  """A source whose labels are only in its records."""

  def __init__(self, labels):
    self.labels_, self.read = labels, 0
    self.num_classes, self.class_names = 3, tuple('abc')

  def __len__(self):
    return len(self.labels_)

  def __getitem__(self, index):
    self.read += 1
    return {'label': self.labels_[index], 'index': index}


def test_draws_hold_each_class_and_fewer_shots_are_a_part_of_more():
  labels = np.random.default_rng(0).integers(0, 3, 3000)
  lazy = Lazy(labels)
  for source in (labels, lazy):
    order = few_shot_draws(1, source, 2, 4, 3)
    assert order.shape == (2, 3, 4) and all(len(set(own.reshape(-1))) == 12 for own in order)
    np.testing.assert_array_equal(labels[order], [[[c] * 4 for c in range(3)]] * 2)
    assert not np.array_equal(*order)
    np.testing.assert_array_equal(few_shot_draws(1, source, 3, 2, 3)[:2], order[:, :, :2])
    assert not np.array_equal(few_shot_draws(2, source, 2, 4, 3), order)
  assert lazy.read < 300
  np.testing.assert_array_equal(
    few_shot_draws(1, labels, 2, 4, 3)[1],
    few_shot_split(np.random.default_rng((1, 1)), labels, 4).reshape(3, 4),
  )


def test_labels_that_a_source_knows_are_not_read_from_its_records():
  labels = np.random.default_rng(0).integers(0, 3, 300)
  lazy, memory = Lazy(labels), data.InMemory({'label': labels})
  lazy.labels = labels
  expected = few_shot_draws(0, labels, 2, 3, 3)
  for source in (lazy, memory):
    np.testing.assert_array_equal(few_shot_draws(0, source, 2, 3, 3), expected)
  assert lazy.read == 0


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda rng: sample_episode(rng, LABELS, 5), 'num_ways is 5, but the pool has only 4 classes'),
    (
      lambda rng: sample_episode(rng, LABELS, 2, 3, 5),
      r'class 6 has 7 images, fewer than num_shots 3 \+ num_queries 5',
    ),
    (lambda rng: sample_episode(rng, LABELS, 0), 'num_ways is 0'),
    (lambda rng: sample_episode(rng, LABELS, 2, 0), 'num_shots is 0'),
    (lambda rng: sample_episode(rng, LABELS, 2, 1, 0), 'num_queries is 0'),
    (lambda rng: sample_episode(rng, LABELS / 2, 2), 'expected a non-empty vector of integers'),
    (lambda rng: sample_episodes(0, LABELS, 0, 2, 1, 1), 'num_episodes is 0'),
    (lambda rng: sample_episodes(-1, LABELS, 1, 2, 1, 1), 'seed is -1'),
    (lambda rng: sample_episodes(0, LABELS, 1, 2, 1, 99), 'class 5 has 9 images'),
    (lambda rng: few_shot_split(rng, LABELS, 8), 'class 6 has 7 images, fewer than num_shots 8'),
    (lambda rng: few_shot_split(rng, LABELS, 0), 'num_shots is 0'),
    (lambda rng: few_shot_draws(0, LABELS, 0, 1, 4), 'num_draws is 0'),
    (lambda rng: few_shot_draws(-1, LABELS, 1, 1, 4), 'seed is -1'),
    (lambda rng: few_shot_draws(0, Lazy(LABELS), 1, 0, 4), 'num_shots is 0'),
    (lambda rng: few_shot_draws(0, Lazy(LABELS % 5), 1, 1, 3), r'has label \d, expected 0 .. 2'),
    (
      lambda rng: few_shot_draws(0, Lazy(np.array([0, 0, 1, 1, 2])), 1, 2, 3),
      '1 classes have fewer than num_shots 2 images, the first is class 2 with 1',
    ),
    (lambda rng: few_shot_split(rng, LABELS % 5, 1, 6), r'lack 2 of 6 classes \(first: \[2, 5\]\)'),
    (lambda rng: few_shot_split(rng, LABELS % 5, 1, 4), r'hold 1 others \(first: \[4\]\)'),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(np.random.default_rng(0))
