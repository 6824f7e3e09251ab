import re

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from jaxlab import data

TEXT = (
  """Alpha beta gamma delta epsilon. One two three four five six seven eight!
Title

Beta beta beta alpha gamma? alpha beta gamma delta beta.
"""
  * 2
  + ' '.join(f'Sentence number {"alpha " * i}beta.' for i in range(2, 40))
)


@pytest.fixture
def files(tmp_path):
  """A tokenizer of a few words, with [CLS] and [SEP], and a text."""
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'alpha', 'beta', 'gamma', '.']
  vocabulary = {word: index for index, word in enumerate(words)}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token='[UNK]'))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.post_processor = processors.TemplateProcessing(
    single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
  )
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'text.txt').write_text(TEXT)
  return {'tokenizer': tmp_path / 'tokenizer.json', 'path': tmp_path / 'text.txt'}


def test_sentences_are_padded_and_what_is_padding_is_said(files):
  source = data.load('sentences', 'train', length=12, **files)
  test = data.Sentences('test', length=12, **files)
  assert not set(source.sentences) & set(test.sentences)
  both = [*source.sentences, *test.sentences]
  assert len(set(both)) == len(both) and 'Title' not in ' '.join(both)
  words = {'alpha': 4, 'beta': 5, 'gamma': 6, '.': 7}
  for sentence, record in zip(source.sentences, (source[i] for i in range(len(source)))):
    ids = [words.get(word, 1) for word in re.findall(r'\w+|[.!?]', sentence)]
    expected = [2, *ids[:10], 3]
    np.testing.assert_array_equal(record['tokens'], expected + [0] * (12 - len(expected)))
    np.testing.assert_array_equal(record['valid'], np.arange(12) < len(expected))
  assert (
    source.num_classes == 8 and len({int(record) for record in source.arrays['valid'].sum(1)}) > 1
  )


def test_a_limit_takes_the_first(files):
  assert (
    data.Sentences('train', limit=2, **files).sentences
    == (data.Sentences('train', **files).sentences[:2])
  )


def test_the_prose_of_python_has_sentences_enough(files):
  source = data.Sentences('train', tokenizer=files['tokenizer'], length=8, limit=1100)
  assert len(source) == 1100


@pytest.mark.parametrize(
  'options, error, message',
  [
    ({'split': 'valid'}, ValueError, "split is 'valid'"),
    ({'length': 2}, ValueError, 'length=2'),
    ({'tokenizer': 'nowhere.json'}, FileNotFoundError, "tokenizer='nowhere.json'"),
  ],
)
def test_what_cannot_be_is_refused(files, options, error, message):
  with pytest.raises(error, match=message):
    data.Sentences(**{**files, **options})


def test_a_file_that_is_no_tokenizer_is_named(files):
  with pytest.raises(ValueError, match=r'text\.txt.* is no tokenizer\.json'):
    data.Sentences('train', tokenizer=files['path'], path=files['path'])
