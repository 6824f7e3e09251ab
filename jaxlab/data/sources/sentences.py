"""Sentences as tokens of a tokenizer file, padded to one length: what a text encoder reads."""

import os
import pathlib
import re
import zlib

import numpy as np

from jaxlab.data.sources.source import InMemory
from jaxlab.data.sources.text import python_reference

_WORDS = range(5, 61)  # of a sentence; shorter ones are headings, longer ones grammar and tables


def sentences(text: str) -> list[str]:
  """Returns the sentences of `text` of 5 to 60 words, each once, in order.

  Split behind '.', '!' and '?' and at empty lines; spaces and line ends are one space.

  >>> sentences('One two three four five. No.  Six seven eight\\nnine ten!')
  ['One two three four five.', 'Six seven eight nine ten!']
  """
  parts = re.split(r'(?<=[.!?])\s+|\n{2,}', text)
  found = (' '.join(part.split()) for part in parts)
  return list(dict.fromkeys(part for part in found if len(part.split()) in _WORDS))


class Sentences(InMemory):
  """Sentences of a text: records `{'tokens': int32 [length], 'valid': bool [length], 'index'}`.

  The test split holds about a tenth of them, by a checksum of the sentence. Sentences are cut at `length`
  tokens, those of the tokenizer's template ([CLS], [SEP]) included; behind shorter ones `valid` is False and
  the token is that of padding.

  Args:
    split: 'train' or 'test'.
    tokenizer: a `tokenizer.json` of the library tokenizers, which has to be installed.
    length: tokens that a model reads.
    limit: take only so many of the split.
    path: a UTF-8 text file; None: the prose that comes with Python (`python_reference`).

  Raises:
    ValueError: for an unknown split, an option out of range, a file that is no tokenizer, or a split without
      sentences.
    FileNotFoundError: if a file is not there.
    ModuleNotFoundError: without tokenizers; says how to install it.
  """

  def __init__(
    self,
    split: str = 'train',
    *,
    tokenizer: str | os.PathLike,
    length: int = 64,
    limit: int | None = None,
    path: str | os.PathLike | None = None,
  ):
    if split not in ('train', 'test'):
      raise ValueError(f"split is {split!r}, expected one of ['train', 'test'].")
    if length < 3 or (limit is not None and limit < 1):
      raise ValueError(
        f'length={length} and limit={limit}: expected at least 3 tokens, 1 sentence.'
      )
    from jaxlab.models.tokenizers import (
      read_tokenizer,
    )  # devices that read features load no networks

    own = read_tokenizer(tokenizer)
    own.enable_truncation(length)
    own.enable_padding(length=length)
    text = python_reference() if path is None else pathlib.Path(path).read_text(encoding='utf-8')
    found = [s for s in sentences(text) if (_belongs_to_test(s)) == (split == 'test')][:limit]
    if not found:
      raise ValueError(f'the {split} split holds no sentence of 5 to 60 words; give more text.')
    encoded = own.encode_batch(found)
    tokens = np.array([one.ids for one in encoded], np.int32)
    valid = np.array([one.attention_mask for one in encoded], bool)
    super().__init__({'tokens': tokens, 'valid': valid}, own.get_vocab_size())
    self.sentences = tuple(found)


def _belongs_to_test(sentence: str) -> bool:
  return zlib.crc32(sentence.encode()) % 10 == 0
