"""Windows of a long sequence of tokens in a file: what a language model of any vocabulary reads."""

import os
import pathlib
from typing import Any

import numpy as np

from jaxlab.data.sources.text import check_tokens


class TokenFile:
  """Windows of tokens out of a `.npy` file: records `{'tokens': int32 [length + 1]}`.

  The file holds one sequence, integers `[tokens]` (uint16 or uint32 save space), e.g. all of a corpus's
  documents behind one another, tokenized once by the tokenizer of the model:

    np.save('train.npy', np.asarray(tokenizer.encode(text).ids, np.uint32))

  It is mapped into memory, not read. A window holds `length` inputs and, one later, their `length` targets.

  Args:
    path: the file.
    vocab_size: tokens must lie below it; checked for each record that is read.
    length: tokens that a model reads.
    stride: tokens from one window to the next; None: `length`.

  Raises:
    FileNotFoundError: if there is no such file; says how one is made.
    ValueError: for an array that is not one axis of integers, or shorter than a window.
  """

  def __init__(
    self, path: str | os.PathLike, vocab_size: int, length: int = 2048, stride: int | None = None
  ):
    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(
        f'{path}: there is no such file. Tokenize the text once and save the tokens in order, '
        f"np.save('{path.name or 'train.npy'}', np.asarray(tokens, np.uint32))."
      )
    self.tokens = np.load(path, mmap_mode='r', allow_pickle=False)
    self.length, self.stride = length, length if stride is None else stride
    if length < 1 or self.stride < 1:
      raise ValueError(f'length={length} and stride={stride} must be positive.')
    if self.tokens.ndim != 1 or not np.issubdtype(self.tokens.dtype, np.integer):
      raise ValueError(
        f'{path} holds {self.tokens.dtype} {self.tokens.shape}, expected integers [tokens].'
      )
    if len(self.tokens) <= length:
      raise ValueError(
        f'{path} holds {len(self.tokens)} tokens, fewer than a window of length + 1 = {length + 1}.'
      )
    self.num_classes = vocab_size
    self.class_names: tuple[str, ...] = ()

  def __len__(self) -> int:
    return (len(self.tokens) - self.length - 1) // self.stride + 1

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}.')
    start = index * self.stride
    window = np.asarray(self.tokens[start : start + self.length + 1])
    check_tokens(window, self.num_classes)
    return {'tokens': window.astype(np.int32), 'index': np.int32(index)}
