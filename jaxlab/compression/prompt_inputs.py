"""What a token classifier of prompts reads: chunks of a text, laid out behind an instruction.

Host code in NumPy. EFPC (Cao et al. 2025, arXiv 2503.07956) on top of LLMLingua-2 (Pan et al. 2024,
arXiv 2403.12968).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlab.compression.prompts import WORD_MARKER


class TokenLayout(NamedTuple):
  """How a tokenizer's pieces make a sequence, and words.

  Attributes:
    begin: id of the first token, `<s>` or `[CLS]`.
    end: id of the token behind each part, `</s>` or `[SEP]`.
    pad: id of padding.
    separators: how many `end` are between instruction and text: RoBERTa's two, BERT's one.
    continuation: what a piece inside of a word begins with, WordPiece's '##'; '': words begin with a marker.
  """

  begin: int
  end: int
  pad: int
  separators: int
  continuation: str = ''

  @property
  def special(self) -> dict[str, int]:
    """Options of `classifier_input`."""
    return {name: getattr(self, name) for name in ('begin', 'end', 'pad', 'separators')}


def token_layout(tokenizer: Any) -> TokenLayout:
  """Returns the layout of a tokenizer: BERT's if it has `[CLS]`, `[SEP]` and `[PAD]`, or else RoBERTa's.

  Args:
    tokenizer: of the library tokenizers; its model tells how pieces inside of a word begin.

  Raises:
    ValueError: for a tokenizer that has neither these nor `<s>`, `</s>` and `<pad>`; for one whose pieces
      neither begin words with U+2581 nor are inside of them with a prefix, such as pairs of bytes (GPT-2's).
  """
  for names, separators in ((('[CLS]', '[SEP]', '[PAD]'), 1), (('<s>', '</s>', '<pad>'), 2)):
    ids = [tokenizer.token_to_id(name) for name in names]
    if None not in ids:
      model = getattr(tokenizer, 'model', None)
      inside = getattr(model, 'continuing_subword_prefix', None) or ''
      if not inside and not _has_marker(tokenizer):
        raise ValueError(
          "token_layout: the tokenizer's pieces have neither U+2581 where words begin (SentencePiece) nor a "
          'prefix inside of words (WordPiece): its words are not told apart, as with pairs of bytes.'
        )
      return TokenLayout(*ids, separators, inside)
  raise ValueError(
    'token_layout: the tokenizer has neither [CLS], [SEP] and [PAD] nor <s>, </s> and <pad>: give a layout.'
  )


def _has_marker(tokenizer: Any) -> bool:
  """Returns whether pieces begin words with a marker, most often a piece by itself, too."""
  if tokenizer.token_to_id(WORD_MARKER) is not None:
    return True
  return any(piece.startswith(WORD_MARKER) for piece in tokenizer.get_vocab())


class ClassifierInput(NamedTuple):
  """One padded sequence for a token classifier, all `[max_length]`.

  Attributes:
    tokens: int32.
    mask: bool, false for padding.
    segments: int32, 1 for the text behind an instruction and what ends it (BERT's second segment, with one
      separator), else 0.
    is_text: bool, true for the tokens that are classified: neither instruction nor special ones nor padding.
  """

  tokens: np.ndarray
  mask: np.ndarray
  segments: np.ndarray
  is_text: np.ndarray


class PromptChunk(NamedTuple):
  """A part of a text that a classifier reads at once.

  Attributes:
    tokens: pieces of the text.
    offsets: int64 `[pieces, 2]`, where each begins and ends in the text, in characters; without the space
      before it.
    inputs: the sequence that holds them.
  """

  tokens: list[str]
  offsets: np.ndarray
  inputs: ClassifierInput


def prompt_chunks(
  text: str,
  instruction: str,
  tokenizer: Any,
  layout: TokenLayout,
  *,
  max_length: int = 512,
  max_instruction: int = 64,
) -> list[PromptChunk]:
  """Returns a text's chunks, each laid out behind the instruction.

  Chunks end behind '.' and before line breaks where they can, see `chunk_tokens`. An instruction that is too
  long is cut, with a warning.

  Args:
    text: to be cut.
    instruction: '' for none.
    tokenizer: of the library tokenizers; it must not cut or pad by itself.
    layout: of the tokenizer, see `token_layout`.
    max_length: tokens of a chunk, instruction and special ones included.
    max_instruction: see `classifier_input`.

  Returns:
    Chunks; none for an empty text.

  Raises:
    ValueError: if the instruction leaves no room for text.
  """
  asked = tokenizer.encode(instruction, add_special_tokens=False).ids if instruction else []
  if len(asked) > max_instruction:
    warnings.warn(
      f'prompt_chunks: an instruction of {len(asked)} tokens is cut to max_instruction={max_instruction}.',
      stacklevel=3,
    )
    asked = asked[:max_instruction]
  room = max_length - 2 - (len(asked) + layout.separators if asked else 0)
  if room < 1:
    raise ValueError(
      f'prompt_chunks: max_length={max_length} leaves no room for text behind an instruction of '
      f'{len(asked)} tokens and special ones.'
    )
  encoded = tokenizer.encode(text, add_special_tokens=False)
  offsets = np.array([_without_space(text, *own) for own in encoded.offsets], np.int64).reshape(
    -1, 2
  )
  options = {**layout.special, 'max_length': max_length, 'max_instruction': max_instruction}
  ends = list(_ends(text, encoded.tokens, offsets))
  return [
    PromptChunk(
      encoded.tokens[cut], offsets[cut], classifier_input(encoded.ids[cut], asked, **options)
    )
    for cut in chunk_tokens(ends, (True,), room)
  ]


def _without_space(text: str, start: int, stop: int) -> tuple[int, int]:
  """Returns a span without the space at its start, which pieces of some tokenizers hold."""
  piece = text[start:stop]
  return start + len(piece) - len(piece.lstrip()), stop


def _ends(text: str, tokens: Sequence[str], offsets: np.ndarray) -> Iterator[bool]:
  """Yields which tokens end a sentence: a '.', and what stands before a line break."""
  following = [*offsets[1:, 0], len(text)]
  for token, (_, stop), after in zip(tokens, offsets, following):
    yield token.lstrip(WORD_MARKER) == '.' or '\n' in text[stop:after]


def chunk_tokens(tokens: Sequence, ends: Collection, max_length: int = 512) -> list[slice]:
  """Returns where to cut a long text: slices of at most `max_length` tokens that end with a sentence.

  While more than `max_length` tokens are left, a chunk ends behind the last token of `ends` among the next
  `max_length` ones, or with the last of these if there is none; what is left is the last chunk.

  Args:
    tokens: a text's tokens, as ids or strings.
    ends: tokens that end a sentence: those of '.' and of the line break.
    max_length: at least 1.

  Returns:
    Slices that cover all tokens; none for an empty text.

  Raises:
    ValueError: for a `max_length` below 1.

  Source: LLMLingua-2's chunks, used by EFPC; its code looks one token further and may so return
  `max_length + 1` of them.

  >>> [''.join('ab.cdefgh.ij'[cut]) for cut in chunk_tokens('ab.cdefgh.ij', '.', 5)]
  ['ab.', 'cdefg', 'h.ij']
  """
  if max_length < 1:
    raise ValueError(f'chunk_tokens: max_length={max_length}, expected at least 1.')
  chunks, start = [], 0
  while len(tokens) - start > max_length:
    limit = start + max_length
    stop = next((i for i in range(limit, start, -1) if tokens[i - 1] in ends), limit)
    chunks.append(slice(start, stop))
    start = stop
  return [*chunks, slice(start, len(tokens))] if start < len(tokens) else chunks


def classifier_input(
  text: Sequence[int],
  instruction: Sequence[int] = (),
  *,
  begin: int,
  end: int,
  pad: int,
  max_length: int = 512,
  max_instruction: int = 64,
  separators: int = 2,
) -> ClassifierInput:
  """Lays out `[instruction ; text]` where there is an instruction, `[text]` otherwise.

  `<s> instruction </s></s> text </s>` with RoBERTa's two separators, `[CLS] instruction [SEP] text [SEP]`
  with BERT's one; without instruction `<s> text </s>`. An instruction longer than `max_instruction` is cut,
  with a warning.

  Args:
    text: token ids of a chunk, see `chunk_tokens`.
    instruction: token ids; empty compresses without a task.
    begin: id of the first token, `<s>` or `[CLS]`.
    end: id of the token behind each part, `</s>` or `[SEP]`.
    pad: id of padding.
    max_length: of the whole sequence.
    max_instruction: tokens of an instruction, at least 1.
    separators: how many `end` are between instruction and text.

  Raises:
    ValueError: for lengths below 1, an empty text, or one that does not fit behind the instruction.

  Source: EFPC, where the instruction is prepended; special tokens, the limit of 64 and that instructions are
  not classified are inferred.

  >>> out = classifier_input([7, 8], [5], begin=0, end=2, pad=1, max_length=8)
  >>> out.tokens.tolist(), out.is_text.astype(int).tolist()
  ([0, 5, 2, 2, 7, 8, 2, 1], [0, 0, 0, 0, 1, 1, 0, 0])
  """
  if max_instruction < 1 or separators < 1:
    raise ValueError(
      f'classifier_input: max_instruction={max_instruction}, separators={separators}; expected at least 1.'
    )
  if len(instruction) > max_instruction:
    warnings.warn(
      f'classifier_input: an instruction of {len(instruction)} tokens is cut to {max_instruction}.',
      stacklevel=2,
    )
  head = [begin, *instruction[:max_instruction], *[end] * separators]
  head = head if len(instruction) else [begin]
  room = max_length - len(head) - 1
  if not 0 < len(text) <= room:
    raise ValueError(
      f'classifier_input: a text of {len(text)} tokens, expected 1 to {max(room, 0)}: what max_length='
      f'{max_length} leaves behind instruction and special tokens.'
    )
  tokens = np.full(max_length, pad, np.int32)
  start, stop = len(head), len(head) + len(text)
  tokens[: stop + 1] = [*head, *text, end]
  place = np.arange(max_length)
  # RoBERTa's networks, with two separators, have one segment.
  second = len(instruction) > 0 and separators == 1
  behind = (place >= start) & (place <= stop) & second
  return ClassifierInput(
    tokens, place <= stop, behind.astype(np.int32), (place >= start) & (place < stop)
  )
