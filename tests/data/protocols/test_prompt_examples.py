import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxlab import data
from jaxlab.data import PromptRecord
from jaxlab.models import train_tokenizer

TEXT = 'The color, of the lamp is red. Nothing else happens here.'
TOKENIZER = train_tokenizer([TEXT] * 3, 200)
RECORD = PromptRecord(TEXT, 'color lamp red', 'the lamp')


def kept(examples, row):
  ids = examples['tokens'][row][examples['labels'][row] == 1]
  return [TOKENIZER.id_to_token(int(own)).lstrip('▁') for own in ids]


def test_pieces_of_kept_words_are_labeled_behind_the_instruction():
  found = data.prompt_examples([RECORD, RECORD._replace(instruction='')], TOKENIZER, max_length=24,
                               max_instruction=4)  # fmt: skip
  assert {name: (a.shape, a.dtype.name) for name, a in found.items()} == {
    'tokens': ((2, 24), 'int32'), 'valid': ((2, 24), 'bool'), 'segments': ((2, 24), 'int32'),
    'labels': ((2, 24), 'int32'), 'counted': ((2, 24), 'bool'),
  }  # fmt: skip
  assert kept(found, 0) == kept(found, 1) == ['color', 'lamp', 'red']
  asked, plain = found['counted']
  size = len(TOKENIZER.encode(TEXT).ids)
  assert asked.sum() == plain.sum() == size
  assert not asked[:4].any() and asked[4] and plain[1]
  assert not (found['labels'] & ~found['counted']).any()
  assert found['segments'][0, 4:].sum() == size + 1 and not found['segments'][1].any()


def test_long_texts_become_chunks_and_words_may_have_several_pieces():
  tokenizer = train_tokenizer(['abcdefghijklmnopqrstuvwxyz ABCN .,'], 60)
  found = data.prompt_examples([RECORD], tokenizer, max_length=30, max_instruction=10)
  assert len(found['tokens']) > 1 and found['counted'].sum() == len(tokenizer.encode(TEXT).ids)
  letters = [
    tokenizer.id_to_token(int(own)) for own in found['tokens'][found['labels'] == 1] if own > 4
  ]
  assert ''.join(letters).replace('▁', '') == 'colorlampred'


def word_level():
  names = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'a', 'b', 'c', 'd', '▁']
  made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token='[UNK]'))
  made.pre_tokenizer = pre_tokenizers.Split('-', 'removed')  # a-b is one word of two pieces
  return made


def test_official_labels_are_shifted_at_the_end_and_count_all_but_padding():
  record = PromptRecord('a, b d', 'b D', 'c')
  lemmas = lambda words: [{'b': 'b-c', 'd': 'd-a', 'D': 'd-a'}.get(w, w) for w in words]  # noqa: E731
  options = {'max_length': 12, 'max_instruction': 2, 'official_quirks': True}
  found = data.prompt_examples([record], word_level(), lemmatize=lemmas, **options)
  # [CLS] c [SEP] a b c d a [SEP]: no comma, b and d kept; the last label and that of the end are swapped.
  assert found['tokens'][0].tolist() == [2, 6, 3, 4, 5, 6, 7, 4, 3, 0, 0, 0]
  assert found['labels'][0].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0]
  np.testing.assert_array_equal(found['counted'], found['valid'])


def test_official_sequences_are_cut_at_the_end():
  record = PromptRecord('a b c d a b', 'c b')
  found = data.prompt_examples(
    [record], word_level(), max_length=5, max_instruction=2, official_quirks=True
  )
  assert found['tokens'][0].tolist() == [2, 4, 5, 6, 3]
  assert found['labels'][0].tolist() == [0, 0, 1, 1, 0]


def test_badly_annotated_texts_are_left_out():
  good = [PromptRecord(TEXT, 'color lamp red') for _ in range(8)]
  records = [
    *good,
    PromptRecord(TEXT, 'something quite different'),
    PromptRecord(TEXT, 'color new'),
  ]
  found = data.prompt_examples(records, TOKENIZER, max_length=24, max_instruction=2, percentile=80)
  assert len(found['tokens']) == 8


def test_bad_input_is_named():
  with pytest.raises(ValueError, match='at least one record'):
    data.prompt_examples([], TOKENIZER)
  with pytest.raises(ValueError, match='record 1 has no compressed text'):
    data.prompt_examples([RECORD, PromptRecord('a')], TOKENIZER)
  with pytest.raises(ValueError, match='2 lemmas for'):
    data.annotate_text(TEXT, 'red', lemmatize=lambda words: ['a', 'b'])
  with pytest.raises(ValueError, match=r'labels \(2,\) and num_pieces \(1,\)'):
    data.piece_labels([True, False], [1])
  assert data.piece_labels([], [], official_quirks=True).tolist() == [False, False]
