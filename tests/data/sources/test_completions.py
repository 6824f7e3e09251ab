import re

import numpy as np
import pytest

from jaxlab import data


def counted_text(record):
  """Returns what is asked for of a record: the tokens whose place before them is counted."""
  return data.decode_arithmetic(record['tokens'][1:][record['counted']])


@pytest.mark.parametrize('seed', range(3))
def test_working_of_every_sum_is_right_and_alone_counts(seed):
  source = data.load('sums', 'train', kind='written', size=200, length=27, seed=seed)
  for index in range(0, 200, 7):
    record = source[index]
    text = data.decode_arithmetic(record['tokens'])
    prompt, answer = re.fullmatch(r'(\d+\+\d+=)(.*;)', text).groups()
    assert counted_text(record) == answer and record['index'] == index
    a, b = map(int, prompt[:-1].split('+'))
    *columns, result = answer[:-1].split(';')
    assert int(result) == a + b and len(columns) == 2
    carry = 0
    for place, column in enumerate(columns):
      left, total = column.split('=')
      parts = list(map(int, left.split('+')))
      digits = [number // 10**place % 10 for number in (a, b)]
      assert parts == digits + [1] * carry and int(total) == sum(parts)
      carry = int(total) // 10


def test_sums_of_numbers_with_more_digits_and_of_unequal_length():
  assert data.written_sum(995, 7) == ('995+7=', '5+7=12;9+0+1=10;9+0+1=10;1002;')
  assert data.written_sum(0, 0) == ('0+0=', '0+0=0;0;')


def test_plain_windows_are_filled_with_right_sums_and_all_of_them_counts():
  source = data.load('sums', 'train', kind='plain', low=0, high=50, length=40, size=30)
  assert len(source) == 30 and source.num_classes == 14
  for record in (source[i] for i in range(30)):
    assert record['counted'].all() and record['tokens'].shape == (41,)
    text = data.decode_arithmetic(record['tokens'])
    for a, b, c in re.findall(r'(\d+)\+(\d+)=(\d+);', text):
      assert int(a) + int(b) == int(c) and max(int(a), int(b)) < 50
  assert len({data.decode_arithmetic(source[i]['tokens']) for i in range(30)}) == 30


@pytest.mark.parametrize('kind', ['plain', 'written'])
def test_no_sum_is_in_both_splits_and_a_seed_gives_the_same_ones(kind):
  pairs = {}
  for split in ('train', 'test'):
    source = data.load('sums', split, kind=kind, low=10, high=40, length=27, seed=3)
    again = data.load('sums', split, kind=kind, low=10, high=40, length=27, seed=3)
    np.testing.assert_array_equal(source.arrays['tokens'], again.arrays['tokens'])
    texts = [data.decode_arithmetic(source[i]['tokens']) for i in range(len(source))]
    pairs[split] = {pair for text in texts for pair in re.findall(r'(?:^|;)(\d\d\+\d\d)=', text)}
  assert len(pairs['test']) > 40 and not pairs['train'] & pairs['test']
  if kind == 'written':
    assert len(pairs['train'] | pairs['test']) == 900
  other = data.load('sums', 'train', kind=kind, low=10, high=40, length=27, seed=4)
  mine = data.load('sums', 'train', kind=kind, low=10, high=40, length=27, seed=3)
  assert not np.array_equal(other.arrays['tokens'], mine.arrays['tokens'])


def test_examples_are_padded_and_cut():
  prompts, answers = [np.array([1, 2]), np.array([3])], [np.array([4]), np.array([5, 6, 7, 8])]
  source = data.Completions(prompts, answers, length=3, vocab_size=9, padding=8)
  assert source[0]['tokens'].tolist() == [1, 2, 4, 8]
  assert source[0]['counted'].tolist() == [False, True, False]
  assert source[1]['tokens'].tolist() == [3, 5, 6, 7]
  assert source[1]['counted'].tolist() == [True, True, True]


def test_files_of_tokens_hold_prompts_and_completions(tmp_path):
  tokens = np.arange(1, 10, dtype=np.uint32)
  arrays = {'tokens': tokens, 'lengths': [4, 5], 'prompt_lengths': [1, 3]}
  np.savez(tmp_path / 'train.npz', **arrays)
  source = data.load('completions', str(tmp_path / 'train.npz'), vocab_size=20, length=6)
  assert len(source) == 2 and source.num_classes == 20
  assert source[1]['tokens'].tolist() == [5, 6, 7, 8, 9, 0, 0]
  assert source[1]['tokens'][1:][source[1]['counted']].tolist() == [8, 9]
  with pytest.raises(FileNotFoundError, match='arrays tokens, lengths, prompt_lengths'):
    data.read_completions(tmp_path / 'none.npz', 20)
  np.savez(tmp_path / 'wrong.npz', **{**arrays, 'lengths': [4, 4]})
  with pytest.raises(ValueError, match=r'sum to 8 .* not fit 9 tokens'):
    data.read_completions(tmp_path / 'wrong.npz', 20)
  np.savez(tmp_path / 'wrong.npz', tokens=tokens)
  with pytest.raises(ValueError, match='no npz file with tokens, lengths'):
    data.read_completions(tmp_path / 'wrong.npz', 20)
  (tmp_path / 'wrong.npz').write_bytes((tmp_path / 'train.npz').read_bytes()[:100])
  with pytest.raises(ValueError, match='no npz file'):
    data.read_completions(tmp_path / 'wrong.npz', 20)
  with pytest.raises(ValueError, match=r'tokens must be in \[0, 9\)'):
    data.read_completions(tmp_path / 'train.npz', 9)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'split': 'validation'}, "split='validation'"),
    ({'kind': 'spoken'}, "kind='spoken'"),
    ({'low': 5, 'high': 5}, 'low=5, high=5'),
    ({'test_share': 1.0}, 'test_share=1.0'),
    ({'kind': 'written', 'size': 8000}, 'size=8000: the train split has 7290 sums'),
    ({'kind': 'written', 'length': 10}, 'length=10: the longest sum has 2'),
  ],
)
def test_impossible_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    data.Sums(**options)


def test_bad_examples_are_named():
  one = [np.array([1])]
  with pytest.raises(ValueError, match='as many completions as prompts, got 1 and 0'):
    data.Completions([], one, 3, 9)
  with pytest.raises(ValueError, match='example 0: a prompt of 0'):
    data.Completions([np.array([], int)], one, 3, 9)
  with pytest.raises(ValueError, match='example 0: a prompt of 4 and a completion of 1 tokens'):
    data.Completions([np.arange(4)], one, 3, 9)
  with pytest.raises(ValueError, match="holds \\['-'\\]"):
    data.encode_arithmetic('1-2=')
