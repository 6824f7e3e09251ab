"""Text as bytes: a tokenizer without vocabulary, a corpus that comes with Python, windows of tokens."""

import functools
import hashlib
import os
import pathlib
import re
import zlib

import numpy as np

from jaxlab.data.sources.source import InMemory

VOCAB_SIZE = 256


def encode(text: str) -> np.ndarray:
  """Returns the UTF-8 bytes of `text` as tokens, int32 `[bytes]` in [0, 256).

  >>> encode('aé').tolist()
  [97, 195, 169]
  """
  return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def decode(tokens: np.ndarray) -> str:
  """Returns the text of byte tokens `[time]`; bytes that are no UTF-8 become U+FFFD.

  Raises:
    ValueError: for tokens outside [0, 256), or more than one axis.

  >>> decode([104, 105])
  'hi'
  """
  tokens = np.asarray(tokens)
  check_tokens(tokens)
  if tokens.ndim != 1:
    raise ValueError(f'decode reads tokens [time], got {tokens.shape}; decode row by row.')
  return tokens.astype(np.uint8).tobytes().decode(errors='replace')


def check_tokens(tokens: np.ndarray, vocab_size: int = VOCAB_SIZE) -> None:
  """Raises ValueError unless `tokens` are integers in [0, vocab_size)."""
  tokens = np.asarray(tokens)
  if not tokens.size:
    return
  if not np.issubdtype(tokens.dtype, np.integer):
    raise ValueError(f'tokens have dtype {tokens.dtype}, expected integers.')
  low, high = tokens.min(), tokens.max()
  if low < 0 or high >= vocab_size:
    raise ValueError(f'tokens must be in [0, {vocab_size}), got values from {low} to {high}.')


@functools.cache
def python_reference() -> str:
  """Returns the prose of Python's language reference that every Python carries for `help()`.

  The topics of `pydoc_data.topics` in the order of their names' CRC-32 (fixed, and without the alphabet's
  order of subjects), each paragraph only where it occurs first: a fifth of the text repeats itself between
  topics. 374 kB in Python 3.11.7. The text belongs to the Python version; see `digest`.
  """
  from pydoc_data import topics

  seen: set[str] = set()
  kept = []
  for name in sorted(topics.topics, key=lambda name: (zlib.crc32(name.encode()), name)):
    for paragraph in re.split(r'\n{2,}', topics.topics[name].strip('\n')):
      if paragraph not in seen:
        seen.add(paragraph)
        kept.append(paragraph)
  return '\n\n'.join(kept) + '\n'


def digest(text: str) -> str:
  """Returns the SHA-256 of the text's bytes in hexadecimal: results on equal text have equal digests."""
  return hashlib.sha256(text.encode()).hexdigest()


class ByteText(InMemory):
  """Windows of bytes of a text: records `{'tokens': int32 [length + 1], 'index'}`.

  A window holds `length` inputs and, one later, their `length` targets. The test split is the text's end; the
  two share no byte.

  Args:
    split: 'train' or 'test'.
    length: tokens that a model reads.
    stride: bytes from one window to the next. None: `length`, so that no byte is a target twice (up to
      `length - 1` at the end never are); a smaller one gives overlapping windows.
    test_share: share of the bytes in the test split.
    path: a UTF-8 text file; None: `python_reference()`.

  Attributes:
    digest: SHA-256 of the whole text (both splits).

  Raises:
    ValueError: for an unknown split or an option out of range, or a split that is shorter than a window.
    FileNotFoundError: if there is no file `path`.
  """

  def __init__(
    self,
    split: str = 'train',
    length: int = 128,
    stride: int | None = None,
    test_share: float = 0.1,
    path: str | os.PathLike | None = None,
  ):
    if split not in ('train', 'test'):
      raise ValueError(f"split is {split!r}, expected one of ['train', 'test'].")
    stride = length if stride is None else stride
    if length < 1 or stride < 1 or not 0 < test_share < 1:
      raise ValueError(
        f'length={length} and stride={stride} must be positive, test_share={test_share} in (0, 1).'
      )
    text = python_reference() if path is None else pathlib.Path(path).read_text(encoding='utf-8')
    tokens = encode(text)
    cut = len(tokens) - round(len(tokens) * test_share)
    part = tokens[:cut] if split == 'train' else tokens[cut:]
    if len(part) <= length:
      raise ValueError(
        f'the {split} split holds {len(part)} bytes, fewer than a window of length + 1 = {length + 1}; '
        f'lower length, or give more text.'
      )
    windows = np.lib.stride_tricks.sliding_window_view(part, length + 1)[::stride]
    super().__init__({'tokens': np.ascontiguousarray(windows)}, VOCAB_SIZE)
    self.digest = digest(text)
