import numpy as np
import pytest

from jaxlab.data import load, make_loader
from jaxlab.data.sources.token_file import TokenFile


def save(folder, tokens):
  path = folder / 'train.npy'
  np.save(path, tokens)
  return path


def test_windows_overlap_by_the_token_that_is_target_and_next_input(tmp_path):
  source = TokenFile(save(tmp_path, np.arange(12, dtype=np.uint16)), 20, length=4)
  assert [source[i]['tokens'].tolist() for i in range(len(source))] == [
    [0, 1, 2, 3, 4],
    [4, 5, 6, 7, 8],
  ]
  assert len(TokenFile(tmp_path / 'train.npy', 20, length=4, stride=1)) == 8
  with pytest.raises(IndexError, match='record 2 of 2'):
    source[2]


def test_a_loader_reads_batches_of_it(tmp_path):
  path = save(tmp_path, np.arange(40, dtype=np.uint32))
  source = load('tokens', f'{path}', vocab_size=50, length=4)
  batch = next(iter(make_loader(source, batch_size=3, seed=0)))
  assert batch['tokens'].shape == (3, 5) and batch['tokens'].dtype == np.int32


@pytest.mark.parametrize(
  ('tokens', 'options', 'match'),
  [
    (np.zeros((2, 3), np.int32), {}, r'int32 \(2, 3\), expected integers \[tokens\]'),
    (np.zeros(5), {}, 'float64'),
    (np.zeros(3, np.int32), {'length': 4}, 'fewer than a window'),
    (np.zeros(9, np.int32), {'length': 4, 'stride': 0}, 'must be positive'),
  ],
)
def test_bad_files_are_named(tokens, options, match, tmp_path):
  with pytest.raises(ValueError, match=match):
    TokenFile(save(tmp_path, tokens), 10, **options)


def test_tokens_outside_of_the_vocabulary_and_missing_files_are_named(tmp_path):
  with pytest.raises(ValueError, match=r'tokens must be in \[0, 10\)'):
    TokenFile(save(tmp_path, np.full(9, 10)), 10, length=4)[0]
  with pytest.raises(FileNotFoundError, match='Tokenize the text once'):
    TokenFile(tmp_path / 'none.npy', 10)
