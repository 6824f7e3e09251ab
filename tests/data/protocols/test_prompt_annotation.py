import numpy as np
import pytest
from golden_vectors import golden

from jaxlab import data


@golden('efpc', 'annotation')
def test_annotation_agrees_with_the_official_code(vectors):
  found = data.annotate_words(
    vectors['in_origin_words'].tolist(),
    vectors['in_compressed_words'].tolist(),
    window=vectors.param('window_size'),
  )
  np.testing.assert_array_equal(found.labels, vectors['out_labels'] == 1)
  for ours, theirs in (
    (found.compression_rate, 'comp_rate'),
    (found.variation_rate, 'variation_rate'),
    (found.hitting_rate, 'hitting_rate'),
    (found.matching_rate, 'matching_rate'),
    (found.alignment_gap, 'alignment_gap'),
  ):
    assert ours == pytest.approx(vectors[f'out_{theirs}'].item(), abs=1e-12)


def labels(original, compressed, **options):
  found = data.annotate_words(original.split(), compressed.split(), **options)
  return found.labels.astype(int).tolist()


def test_a_word_is_labeled_once_and_looked_for_ahead_before_behind():
  assert labels('a b a', 'a a a') == [1, 0, 1]
  assert labels('x y b x z', 'b x') == [0, 0, 1, 1, 0]
  assert labels('x b y z x', 'b x') == [1, 1, 0, 0, 0]
  assert labels('b x c b', 'x b') == [1, 1, 0, 0]


def test_the_window_limits_how_far_words_are_looked_for_and_how_far_the_place_moves():
  assert labels('x x x a', 'a', window=4) == [0, 0, 0, 1]
  assert labels('x x x a', 'a', window=3) == [0, 0, 0, 0]
  # Found at 3, the place is 2 from then on: 6 is out of reach, though 3 + 3 is not.
  assert labels('x x x a x x b', 'a b', window=4) == [0, 0, 0, 1, 0, 0, 0]
  assert labels('x x x a x b x', 'a b', window=4) == [0, 0, 0, 1, 0, 1, 0]


def test_rates_tell_new_words_from_words_that_are_not_found_in_their_place():
  found = data.annotate_words(['a', 'b', 'b', 'c'], ['A', 'a', 'new'])
  assert found.variation_rate == pytest.approx(1 / 3)
  assert (found.hitting_rate, found.matching_rate, found.alignment_gap) == (0.5, 0.25, 0.25)
  empty = data.annotate_words(['a', 'b'], [])
  assert not empty.labels.any() and empty[1:] == (0, 0, 0, 0, 0)


def test_filter_leaves_out_the_worst_tenth_twice():
  rates = np.arange(100) / 100
  kept = data.filter_annotations(rates, rates[::-1])
  # 0.891 is the percentile of all, then 0.901 that of gaps 0.10 ... 0.99 but for the bound itself.
  assert kept.tolist() == list(range(9, 90))


def test_filter_passes_over_a_rate_that_is_nearly_always_the_same():
  with pytest.warns(UserWarning, match='variation_rates is their minimum 0'):
    kept = data.filter_annotations([0] * 19 + [1], np.arange(20) / 20)
  assert kept.tolist() == list(range(18))


def test_mix_holds_each_plain_text_once_and_distinct_instructed_ones():
  order = data.mix_instructed(np.random.default_rng(0), 300, 40, 0.1)
  assert len(order) == 330 and len(set(order.tolist())) == 330 and order.max() < 340
  assert set(order.tolist()) >= set(range(300))
  assert order[:300].tolist() != sorted(order[:300].tolist())
  again = data.mix_instructed(np.random.default_rng(0), 300, 40, 0.1)
  np.testing.assert_array_equal(order, again)
  assert sorted(data.mix_instructed(np.random.default_rng(0), 5, 0, 0)) == list(range(5))


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: data.annotate_words([], ['a']), 'original is empty'),
    (lambda: data.annotate_words('a b', ['a']), 'original is a string'),
    (lambda: data.annotate_words(['a'], 'a'), 'compressed is a string'),
    (lambda: data.annotate_words(['a'], ['a'], window=0), 'window=0'),
    (lambda: data.filter_annotations([], []), 'not empty'),
    (lambda: data.filter_annotations([0.0], [0.0, 1.0]), 'of one length'),
    (lambda: data.filter_annotations([0.0, 1.0], [0.0, np.nan]), 'alignment_gaps has values'),
    (lambda: data.filter_annotations([0.0], [0.0], percentile=0), 'percentile=0'),
    (lambda: data.mix_instructed(np.random.default_rng(0), 0, 5, 0.1), 'num_plain=0'),
    (lambda: data.mix_instructed(np.random.default_rng(0), 10, 5, -0.1), 'rate=-0.1'),
    (lambda: data.mix_instructed(np.random.default_rng(0), 100, 5, 0.1), 'asks for 10 instructed'),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
