"""Tokenizers of text, through the library tokenizers: read from a file, or trained on local text.

What is returned is `tokenizers.Tokenizer`, without truncation and padding: who reads long texts cuts them.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import tokenizers

SPECIAL_TOKENS = ('[PAD]', '[UNK]', '[CLS]', '[SEP]')


def read_tokenizer(path: str | os.PathLike) -> tokenizers.Tokenizer:
  """Returns the tokenizer of a `tokenizer.json`.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for a file that is no tokenizer.
    ModuleNotFoundError: without tokenizers; says how to install it.
  """
  library, path = _library(), pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'tokenizer={str(path)!r}: there is no such file.')
  try:
    found = library.Tokenizer.from_file(str(path))
  except Exception as error:
    raise ValueError(f'tokenizer={str(path)!r} is no tokenizer.json: {error}') from error
  found.no_truncation()
  found.no_padding()
  return found


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> tokenizers.Tokenizer:
  """Returns a byte-pair tokenizer trained on some texts; equal texts give equal ones.

  Words begin with U+2581, punctuation stands by itself, case is kept. The tokens `[PAD]`, `[UNK]`, `[CLS]`
  and `[SEP]` are 0 to 3; `[UNK]` is each character that the texts do not hold.

  Args:
    texts: to learn from.
    vocab_size: at most so many tokens.

  Raises:
    ValueError: for a vocabulary smaller than the texts' characters, or texts without any.
    ModuleNotFoundError: without tokenizers; says how to install it.

  >>> train_tokenizer(['low lower lowest, low'], 30).encode('low lower.').tokens
  ['▁low', '▁lower', '[UNK]']
  """
  library, texts = _library(), list(texts)
  characters = len({own for text in texts for own in text if not own.isspace()})
  least = len(SPECIAL_TOKENS) + 1 + characters
  if not characters or vocab_size < least:
    raise ValueError(
      f'train_tokenizer: vocab_size={vocab_size} for texts of {characters} characters; expected characters, '
      f'and at least {least} tokens.'
    )
  made = library.Tokenizer(library.models.BPE(unk_token='[UNK]'))
  made.normalizer = library.normalizers.Replace(library.Regex(r'\s+'), ' ')
  made.pre_tokenizer = library.pre_tokenizers.Sequence([
    library.pre_tokenizers.Metaspace(prepend_scheme='always'),
    library.pre_tokenizers.Split(library.Regex(r'\u2581?[^\w\s\u2581]'), 'isolated'),
  ])  # fmt: skip
  made.decoder = library.decoders.Metaspace(prepend_scheme='always')
  trainer = library.trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False
  )
  made.train_from_iterator(texts, trainer)
  return made


def _library() -> Any:
  try:
    import tokenizers
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      'text is cut into tokens by the library tokenizers: pip install tokenizers'
    ) from error
  return tokenizers
