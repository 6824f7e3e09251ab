"""Prompts with the completions that a language model learns: sums in characters, and files of tokens."""

from __future__ import annotations

import os
import pathlib
import zipfile
from typing import Literal

import numpy as np

from jaxlab.data.sources.source import InMemory
from jaxlab.data.sources.text import check_tokens

CHARACTERS = ' 0123456789+=;'  # the first one pads


def encode_arithmetic(text: str) -> np.ndarray:
  """Returns the tokens of a sum, int32 `[characters]`: places in ' 0123456789+=;'.

  Raises:
    ValueError: for other characters.

  >>> encode_arithmetic('1+9=10;').tolist()
  [2, 11, 10, 12, 2, 1, 13]
  """
  if wrong := sorted(set(text) - set(CHARACTERS)):
    raise ValueError(f'{text!r} holds {wrong}, expected characters of {CHARACTERS!r}.')
  return np.array([CHARACTERS.index(character) for character in text], np.int32)


def decode_arithmetic(tokens: np.ndarray) -> str:
  """Returns the text of tokens `[time]`, without the padding behind it.

  >>> decode_arithmetic(encode_arithmetic('1+9=10;  '))
  '1+9=10;'
  """
  check_tokens(tokens, len(CHARACTERS))
  return ''.join(CHARACTERS[token] for token in tokens).rstrip(CHARACTERS[0])


def plain_sum(a: int, b: int) -> tuple[str, str]:
  """Returns a sum as prompt and completion, its result alone.

  >>> plain_sum(7, 15)
  ('7+15=', '22;')
  """
  return f'{a}+{b}=', f'{a + b};'


def written_sum(a: int, b: int) -> tuple[str, str]:
  """Returns a sum as prompt and completion: the working, column by column from the units, and the result.

  A column adds the digits, and 1 where the one before it carried.

  >>> written_sum(47, 38)
  ('47+38=', '7+8=15;4+3+1=8;85;')
  """
  digits = max(len(str(a)), len(str(b)))
  columns, carry = [], 0
  for place in range(digits):
    x, y = (number // 10**place % 10 for number in (a, b))
    total = x + y + carry
    columns.append(f'{x}+{y}{"+1" * carry}={total};')
    carry = total // 10
  return f'{a}+{b}=', ''.join(columns) + f'{a + b};'


class Completions(InMemory):
  """Prompts and completions: records `{'tokens': int32 [length + 1], 'counted': bool [length], 'index'}`.

  A model reads all tokens but the last and says each one's next; `counted` marks where that is a token of the
  completion, not of the prompt or of the padding behind it.

  Args:
    prompts: tokens of each prompt, at least one.
    completions: tokens of each completion.
    length: tokens that a model reads; longer examples are cut.
    vocab_size: tokens must lie below it.
    padding: the token behind shorter examples.

  Raises:
    ValueError: for no examples, an empty prompt, tokens that are none; if cutting leaves an example nothing
      of its completion.
  """

  def __init__(
    self,
    prompts: list[np.ndarray],
    completions: list[np.ndarray],
    length: int,
    vocab_size: int,
    padding: int = 0,
  ):
    if not prompts or len(prompts) != len(completions):
      raise ValueError(
        f'expected as many completions as prompts, got {len(completions)} and {len(prompts)}.'
      )
    tokens = np.full((len(prompts), length + 1), padding, np.int32)
    counted = np.zeros((len(prompts), length), bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
      start = len(prompt)
      end = min(start + len(completion), length + 1)
      if not start or end <= start:
        raise ValueError(
          f'example {row}: a prompt of {start} and a completion of {len(completion)} tokens; expected '
          f'some of both within length + 1 = {length + 1}.'
        )
      tokens[row, :end] = np.concatenate([prompt, completion])[:end]
      counted[row, start - 1 : end - 1] = True
    check_tokens(tokens, vocab_size)
    super().__init__({'tokens': tokens, 'counted': counted}, vocab_size)


class Sums(InMemory):
  """Sums of two numbers as characters, without or with the working: records as of `Completions`.

  'plain': each record is one window of as many sums `a+b=c;` as it holds, one after the other, and all of its
  tokens count: what a language model is pre-trained on. 'written': each record is one sum with its working
  (`written_sum`), padded, of which working and result count: what it is tuned on. The pairs of the test split
  are none of the training split's.

  Args:
    split: 'train' or 'test'.
    kind: 'plain' or 'written'.
    low: smallest number.
    high: the numbers lie below it.
    length: tokens that a model reads.
    size: number of records; of 'written' sums at most the pairs of the split, None: all of them.
    test_share: share of the pairs in the test split.
    seed: of pairs, split and order.

  Raises:
    ValueError: for an unknown split or kind, or an option out of range.

  >>> decode_arithmetic(Sums('test', 'written', size=1)[0]['tokens'])
  '14+34=4+4=8;1+3=4;48;'
  """

  def __init__(
    self,
    split: str = 'train',
    kind: Literal['plain', 'written'] = 'plain',
    *,
    low: int = 10,
    high: int = 100,
    length: int = 27,
    size: int | None = None,
    test_share: float = 0.1,
    seed: int = 0,
  ):
    if split not in ('train', 'test') or kind not in ('plain', 'written'):
      raise ValueError(
        f"split={split!r}, kind={kind!r}: expected 'train' or 'test', and 'plain' or 'written'."
      )
    if not 0 <= low < high or length < 1 or not 0 < test_share < 1:
      raise ValueError(
        f'low={low}, high={high}, length={length}, test_share={test_share}: expected 0 <= low < high, a '
        'positive length and a share in (0, 1).'
      )
    rng = np.random.default_rng(seed)
    pairs = rng.permutation((high - low) ** 2)
    cut = len(pairs) - round(len(pairs) * test_share)
    pairs = pairs[:cut] if split == 'train' else pairs[cut:]
    most = len(pairs) if kind == 'written' else np.inf
    size = len(pairs) if size is None else size
    if not 1 <= size <= most:
      raise ValueError(f'size={size}: the {split} split has {len(pairs)} sums, expected 1 or more.')
    numbers = low + np.stack(np.divmod(pairs, high - low), 1)
    if kind == 'written':
      texts = [written_sum(int(a), int(b)) for a, b in numbers[:size]]
      longest = max(len(prompt) + len(completion) for prompt, completion in texts)
      if longest > length + 1:
        raise ValueError(f'length={length}: the longest sum has {longest} characters.')
      both = ([encode_arithmetic(text[part]) for text in texts] for part in (0, 1))
      arrays = Completions(*both, length, len(CHARACTERS)).arrays
    else:
      arrays = _windows(numbers, size, length, np.random.default_rng((seed, split == 'test')))
    super().__init__(arrays, len(CHARACTERS))


def _windows(
  numbers: np.ndarray, size: int, length: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
  tokens = np.empty((size, length + 1), np.int32)
  for row in range(size):
    text = ''
    while len(text) <= length:
      text += ''.join(plain_sum(*numbers[rng.integers(len(numbers))].tolist()))
    tokens[row] = encode_arithmetic(text[: length + 1])
  return {'tokens': tokens, 'counted': np.ones((size, length), bool)}


def read_completions(
  path: str | os.PathLike, vocab_size: int, length: int = 32768, padding: int = 0
) -> Completions:
  """Returns the examples of a `.npz` file, tokenized once by the tokenizer of the model.

    ids = [(tokenizer.encode(prompt).ids, tokenizer.encode(answer).ids) for prompt, answer in examples]
    np.savez(
      'train.npz',
      tokens=np.concatenate([np.array(a + b, np.uint32) for a, b in ids]),
      prompt_lengths=[len(a) for a, b in ids], lengths=[len(a + b) for a, b in ids])

  Args:
    path: the file; `tokens` are those of all examples behind one another, `lengths` how many each has,
      `prompt_lengths` how many of these are its prompt's.
    vocab_size: tokens must lie below it.
    length: tokens that a model reads; longer examples are cut.
    padding: the token behind shorter examples.

  Raises:
    FileNotFoundError: if there is no such file; says what it holds.
    ValueError: for a file that is none of these, and what `Completions` raises.
  """
  path = pathlib.Path(path)
  names = ('tokens', 'lengths', 'prompt_lengths')
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: there is no such file. It is to hold arrays {", ".join(names)}, see '
      'jaxlab.data.read_completions.'
    )
  try:
    with np.load(path, allow_pickle=False) as file:
      tokens, lengths, prompts = (file[name] for name in names)
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f'{path} is no npz file with {", ".join(names)}: {error}.') from error
  if lengths.shape != prompts.shape or lengths.ndim != 1 or lengths.sum() != tokens.size:
    raise ValueError(
      f'{path}: lengths {lengths.shape} that sum to {lengths.sum()} and prompt_lengths {prompts.shape} do '
      f'not fit {tokens.size} tokens.'
    )
  examples = np.split(tokens, np.cumsum(lengths)[:-1])
  both = zip(examples, prompts, strict=True)
  halves = [(tokens[:count], tokens[count:]) for tokens, count in both]
  return Completions(*map(list, zip(*halves)), length, vocab_size, padding)
