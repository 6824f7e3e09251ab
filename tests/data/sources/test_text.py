import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import data
from jaxlab.data.sources import text


@settings(max_examples=50, deadline=None)
@given(st.text('aé€😀\n\0'))
def test_decode_inverts_encode(string):
  tokens = text.encode(string)
  assert tokens.dtype == np.int32 and len(tokens) == len(string.encode())
  assert text.decode(tokens) == string


def test_bytes_that_are_no_text_are_marked():
  assert text.decode(np.array([65, 255, 66])) == 'A\ufffdB'
  with pytest.raises(ValueError, match=r'tokens must be in \[0, 256\), got values from 3 to 256'):
    text.decode([3, 256])
  with pytest.raises(ValueError, match='expected integers'):
    text.decode([0.5])
  with pytest.raises(ValueError, match='decode row by row'):
    text.decode([[1, 2]])


def test_corpus_is_large_prose_without_repeated_paragraphs_and_the_same_in_every_process():
  corpus = text.python_reference()
  assert len(corpus) > 200_000
  paragraphs = corpus.strip('\n').split('\n\n')
  assert len(set(paragraphs)) == len(paragraphs)
  assert 'The "while" statement is used for repeated execution' in corpus
  code = 'from jaxlab.data.sources import text; print(text.digest(text.python_reference()))'
  other = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert other.stdout.strip() == text.digest(corpus) == data.load('text', length=64).digest
  assert text.digest('a') == hashlib.sha256(b'a').hexdigest()


def test_windows_cover_each_split_and_the_splits_share_no_byte(tmp_path):
  everything = ''.join(chr(32 + i % 90) for i in range(100))
  (tmp_path / 'text.txt').write_text(everything)
  options = {'length': 8, 'test_share': 0.2, 'path': tmp_path / 'text.txt'}
  train, test = data.load('text', 'train', **options), data.load('text', 'test', **options)
  tokens = text.encode(everything)
  for source, part in ((train, tokens[:80]), (test, tokens[80:])):
    assert len(source) == (len(part) - 1) // 8
    for index in range(len(source)):
      record = source[index]
      assert record['tokens'].dtype == np.int32 and record['index'] == index
      np.testing.assert_array_equal(record['tokens'], part[8 * index : 8 * index + 9])
  overlapping = data.load('text', 'train', stride=1, **options)
  assert len(overlapping) == 80 - 8
  np.testing.assert_array_equal(overlapping[5]['tokens'], tokens[5:14])
  assert train.num_classes == 256 and len(train.class_names) == 256


def test_loader_shuffles_windows_by_seed(tmp_path):
  (tmp_path / 'text.txt').write_text('abcdefghij' * 30)
  source = data.load('text', length=4, path=tmp_path / 'text.txt')

  def first(seed):
    loader = data.make_loader(source, batch_size=8, seed=seed)
    batch = next(iter(loader))
    loader.close()
    return batch

  batch = first(0)
  assert batch['tokens'].shape == (8, 5)
  np.testing.assert_array_equal(batch['tokens'], source.arrays['tokens'][batch['index']])
  np.testing.assert_array_equal(batch['index'], first(0)['index'])
  assert (batch['index'] != first(1)['index']).any()


@pytest.mark.parametrize(
  'options, message',
  [
    ({'split': 'val'}, "split is 'val'"),
    ({'length': 0}, 'length=0 and stride=0 must be positive'),
    ({'stride': 0}, 'stride=0'),
    ({'test_share': 1.0}, r'test_share=1.0 in \(0, 1\)'),
    ({'split': 'test', 'length': 10**6}, r'fewer than a window of length \+ 1 = 1000001'),
    ({'width': 3}, "data set 'text'.*'width'"),
  ],
)
def test_wrong_options_raise(options, message):
  with pytest.raises(ValueError, match=message):
    data.load('text', **options)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'nothing\.txt'):
    data.load('text', path=tmp_path / 'nothing.txt')
