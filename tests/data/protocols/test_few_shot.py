import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from jaxlab.data.protocols.few_shot import few_shot_split, sample_episode, sample_episodes

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
    (lambda rng: few_shot_split(rng, LABELS % 5, 1, 6), r'lack 2 of 6 classes \(first: \[2, 5\]\)'),
    (lambda rng: few_shot_split(rng, LABELS % 5, 1, 4), r'hold 1 others \(first: \[4\]\)'),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(np.random.default_rng(0))
