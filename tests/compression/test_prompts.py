import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab import compression


@golden('efpc', 'word_selection')
def test_words_and_their_selection_agree_with_the_official_code(vectors):
  force = [token for token in vectors.param('force_tokens') if token]
  merged = compression.merge_words(
    vectors['in_tokens'].tolist(),
    vectors['in_token_preserve_probs'],
    force_tokens=force,
    reserve_digits=vectors.param('force_reserve_digit'),
    reduce=vectors.param('word_prob_mode'),
  )
  assert list(merged.words) == vectors['out_words'].tolist()
  # The official means were taken in float32.
  assert_close(merged.probabilities, vectors['out_word_probs'], rtol=1e-6)
  counts, drop = vectors['in_num_llm_tokens_per_word'], vectors.param('drop_consecutive')
  for name in vectors['param_rates'].astype(
    str
  ):  # the shortest decimal form in the file's precision
    rate = float(name)
    keep = compression.select_words(merged, counts, rate, force_tokens=force, drop_consecutive=drop)
    np.testing.assert_array_equal(keep, vectors[f'out_keep_rate_{name}'] == 1)
    if not drop:
      threshold = compression.keep_threshold(merged.probabilities, counts, rate)
      assert_close(threshold, vectors[f'out_threshold_rate_{name}'], rtol=1e-6)


def prompt(words, probabilities):
  return compression.PromptWords(
    tuple(words), np.asarray(probabilities, np.float64), np.ones(len(words), bool)
  )


def kept(words, probabilities, rate, **options):
  merged = prompt(words, probabilities)
  keep = compression.select_words(merged, np.ones(len(words), int), rate, **options)
  return [word for word, stays in zip(words, keep, strict=True) if stays]


# Fillers of little probability take the share that goes.
FILLERS, LOW = list('uvwz'), [0.01, 0.02, 0.03, 0.04]


@pytest.mark.parametrize(
  'words, probabilities, expected',
  [
    ('a..b', [0.9, 1, 1, 0.8], 'a.b'),
    ('a.x.', [0.9, 1, 0.005, 1], 'a.'),
    ('a.x.', [0.9, 1, 0.95, 1], 'a.x.'),
    ('a.?.b', [0.9, 1, 1, 1, 0.8], 'a.?.b'),
    ('a...b', [0.9, 1, 1, 1, 0.8], 'a.b'),
  ],
)
def test_repeated_forced_tokens_are_dropped(words, probabilities, expected):
  options = {'force_tokens': ['.', '?'], 'drop_consecutive': True}
  found = kept([*words, *FILLERS], [*probabilities, *LOW], 0.6, **options)
  assert ''.join(found[: len(expected)]) == expected and found.count('.') == expected.count('.')


def test_a_forced_token_next_to_its_twin_is_dropped_though_a_word_of_the_first_threshold_is_between():
  # x is above the percentile of words, each counted once, but not above that of the target's tokens.
  merged = prompt(['.', 'x', '.', 'u', 'v', 'w'], [1, 0.5, 1, 0.1, 0.1, 0.4])
  counts = [2, 1, 2, 1, 1, 1]
  options = {'force_tokens': ['.'], 'drop_consecutive': True}
  assert 0.5 < compression.keep_threshold(merged.probabilities, counts, 0.5) < 1
  keep = compression.select_words(merged, counts, 0.5, **options)
  assert keep.tolist() == [True, False, False, False, False, False]
  assert compression.select_words(merged, counts, 0.5)[2]


def test_pieces_are_forced_not_words_of_several():
  for force, expected in (('Newer', 0.3), ('New', 0.7)):
    merged = compression.merge_words(['\u2581New', 'er'], [0.2, 0.4], force_tokens=[force])
    assert merged.words == ('Newer',) and merged.probabilities == pytest.approx([expected])


def test_rates_and_equal_probabilities():
  assert kept('abc', [0.5] * 3, 0.5) == []
  assert kept('abc', [0.5] * 3, 0.5, at_least_one=True) == ['a']
  assert kept('abc', [1.0] * 3, 0.5) == ['a', 'b', 'c']
  assert kept('abc', [0.0, 0.1, 0.1], 1.0) == ['a', 'b', 'c']
  assert kept('', [], 0.5) == []
  # Rounding makes the level of 0.9 ten, not eleven: with 101 values the percentile is that value itself.
  assert compression.keep_threshold(np.arange(101) / 100, np.ones(101, int), 0.9) == 0.1
  assert compression.keep_threshold(np.arange(101) / 100, np.ones(101, int), 0.5) == 0.51


def test_words_count_as_often_as_the_target_has_tokens_for_them():
  merged = prompt('abcd', [0.1, 0.2, 0.3, 0.4])
  few = compression.select_words(merged, [1, 1, 1, 1], 0.5)
  many = compression.select_words(merged, [1, 1, 1, 10], 0.9)
  assert few.tolist() == [False, False, True, True]
  assert many.tolist() == [False, False, True, True]


def test_pieces_become_words():
  pieces = ['<s>', 'ing', '\u2581New', 'er', "'", 's', '\u2581x2', '\u2581Q', 'Q', '</s>']
  probabilities = np.linspace(0, 0.9, 10)
  merged = compression.merge_words(pieces, probabilities, force_tokens=['Q'], reserve_digits=True)
  assert merged.words == ('ing', 'Newer', "'s", 'x2', 'Q', 'Q')
  np.testing.assert_allclose(merged.probabilities, [0.1, 0.25, 0.45, 1, 1, 1])
  assert compression.kept_text(merged, [1, 1, 1, 1, 0, 1]) == "ing Newer's x2Q"
  first = compression.merge_words(pieces, probabilities, reduce='first')
  np.testing.assert_allclose(first.probabilities[:3], [0.1, 0.2, 0.4])
  empty = compression.merge_words(['<s>', '</s>'], [0.5, 0.5])
  assert compression.kept_text(empty, []) == '' and empty.probabilities.shape == (0,)


@pytest.mark.parametrize(
  'text', ['', 'abc', 'ab.cdefgh.ij', '......', 'abcdefghijklm', 'abcd.efgh.']
)
@pytest.mark.parametrize('length', [1, 2, 5])
def test_chunks_cover_the_text_and_end_with_a_sentence_where_they_can(text, length):
  chunks = [text[cut] for cut in compression.chunk_tokens(text, '.', length)]
  assert ''.join(chunks) == text and all(0 < len(chunk) <= length for chunk in chunks)
  for chunk in chunks[:-1]:
    assert chunk.endswith('.') or ('.' not in chunk and len(chunk) == length)


def test_layout_of_instruction_and_text():
  special = {'begin': 101, 'end': 102, 'pad': 0}
  pair = compression.classifier_input([7, 8], [5, 6], **special, max_length=9, separators=1)
  assert pair.tokens.tolist() == [101, 5, 6, 102, 7, 8, 102, 0, 0]
  assert pair.segments.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0]
  assert pair.tokens[pair.is_text].tolist() == [7, 8] and pair.mask.sum() == 7
  plain = compression.classifier_input([7, 8], **special, max_length=4)
  assert plain.tokens.tolist() == [101, 7, 8, 102]
  assert not plain.segments.any() and plain.mask.all()
  assert plain.tokens[plain.is_text].tolist() == [7, 8]
  with pytest.warns(UserWarning, match='3 tokens is cut to 2'):
    cut = compression.classifier_input([7], [4, 5, 6], **special, max_length=7, max_instruction=2)
  assert cut.tokens.tolist() == [101, 4, 5, 102, 102, 7, 102]


SPECIAL = {'begin': 0, 'end': 2, 'pad': 1}
WORDS = prompt('ab', [0.1, 0.2])


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: compression.chunk_tokens('ab', '.', 0), 'max_length=0'),
    (lambda: compression.classifier_input([], **SPECIAL), 'a text of 0 tokens'),
    (lambda: compression.classifier_input([5] * 511, **SPECIAL), 'expected 1 to 510'),
    (lambda: compression.classifier_input([5], [6] * 4, **SPECIAL, max_length=8), '1 to 0'),
    (lambda: compression.classifier_input([5], [6], **SPECIAL, max_instruction=0), 'instruction=0'),
    (lambda: compression.merge_words(['a'], [0.1, 0.2]), 'one for each of 1 tokens'),
    (lambda: compression.merge_words(['a'], [np.nan]), r'in \[0, 1\]'),
    (lambda: compression.merge_words(['a'], [0.1], reduce='max'), "reduce='max'"),
    (lambda: compression.merge_words(['a'], [0.1], force_tokens=['']), 'empty string'),
    (lambda: compression.budget_rate(0, 5), 'budget=0'),
    (lambda: compression.keep_threshold([], [], 0.5), 'at least one word'),
    (lambda: compression.select_words(WORDS, [1, 1], 0.0), 'rate=0.0'),
    (lambda: compression.select_words(WORDS, [1, 1], 1.5), 'rate=1.5'),
    (lambda: compression.select_words(WORDS, [1], 0.5), r'int64 \(1,\)'),
    (lambda: compression.select_words(WORDS, [1.0, 1.0], 0.5), 'float64'),
    (lambda: compression.select_words(WORDS, [0, 0], 0.5), 'at least one token'),
    (lambda: compression.kept_text(WORDS, [True]), 'each of 2 words'),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
