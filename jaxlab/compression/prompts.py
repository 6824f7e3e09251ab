"""Making a prompt small: which of its words stay, by the probabilities of a token classifier.

`chunk_tokens` cuts a long text, `classifier_input` puts the instruction before a chunk (or none: the same
classifier compresses for a task and without one), `merge_words` turns probabilities of sub-words into those
of words, `select_words` keeps the most probable ones, `kept_text` writes them down. EFPC (Cao et al. 2025,
arXiv 2503.07956) on top of LLMLingua-2 (Pan et al. 2024, arXiv 2403.12968), whose selection it takes over.

The rest of this room shrinks networks, this file what they read. Host code in NumPy and strings; the labels
of the classifier are made in `jaxlab.data.protocols.prompt_annotation`.
"""

from __future__ import annotations

import string
import warnings
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

WORD_MARKER = '\u2581'  # SentencePiece's mark of a piece that begins a word
SPECIAL_TOKENS = ('<s>', '</s>', '<unk>', '<pad>', '<mask>')


class PromptWords(NamedTuple):
  """Words of a chunk, merged from a tokenizer's pieces.

  Attributes:
    words: without the marker.
    probabilities: float64 `[words]`, of being preserved.
    spaced: bool `[words]`, true where the marker (a space) came before the word.
  """

  words: tuple[str, ...]
  probabilities: np.ndarray
  spaced: np.ndarray


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


def merge_words(
  tokens: Sequence[str],
  probabilities: ArrayLike,
  *,
  force_tokens: Collection[str] = (),
  reserve_digits: bool = False,
  reduce: str = 'mean',
  special_tokens: Collection[str] = SPECIAL_TOKENS,
  marker: str = WORD_MARKER,
) -> PromptWords:
  """Merges sub-words into words, with the mean probability of their pieces or that of the first one.

  A piece begins a word if it starts with the marker, is one ASCII punctuation character, or is a forced
  token; the others are appended to the word before (the first piece of a chunk begins one in any case, where
  the official code fails). Forced tokens, compared without the marker, have probability 1, and with
  `reserve_digits` every piece with a digit.

  Args:
    tokens: pieces of a chunk.
    probabilities: `[pieces]`, of being preserved.
    force_tokens: pieces to keep whatever their probability.
    reserve_digits: keep digits likewise.
    reduce: `'mean'` or `'first'`.
    special_tokens: pieces that are skipped.
    marker: what begins a word.

  Raises:
    ValueError: for probabilities that are not one of [0, 1] a piece, an empty forced token, or another
      `reduce`.

  Source: LLMLingua-2's code.

  >>> merged = merge_words(
  ...   ['\u2581comp', 'ress', '.', '\u2581it'], [0.5, 1.0, 0.25, 0.0], force_tokens=['.']
  ... )
  >>> merged.words, merged.probabilities.tolist(), merged.spaced.tolist()
  (('compress', '.', 'it'), [0.75, 1.0, 0.0], [True, False, True])
  """
  values = np.asarray(probabilities, np.float64)
  if values.shape != (len(tokens),) or not np.all((values >= 0) & (values <= 1)):
    raise ValueError(
      f'merge_words: probabilities {values.shape} must be in [0, 1], one for each of {len(tokens)} tokens.'
    )
  if reduce not in ('mean', 'first'):
    raise ValueError(f"merge_words: reduce={reduce!r}, expected 'mean' or 'first'.")
  if '' in force_tokens:
    raise ValueError('merge_words: force_tokens holds an empty string; give no token instead.')
  words, spaced, pieces = [], [], []
  for token, value in zip(tokens, values.tolist()):
    if token in special_tokens:
      continue
    bare = token.removeprefix(marker)
    punctuation = len(token) == 1 and token in string.punctuation
    begins = token.startswith(marker) or punctuation or bare in force_tokens
    reserved = reserve_digits and any(map(str.isdecimal, token))
    if begins or not words:
      words.append(bare)
      spaced.append(token.startswith(marker))
      pieces.append([1.0 if reserved or bare in force_tokens else value])
    else:
      words[-1] += bare
      pieces[-1].append(1.0 if reserved else value)
  means = [np.mean(own) if reduce == 'mean' else own[0] for own in pieces]
  return PromptWords(tuple(words), np.array(means, np.float64), np.array(spaced, bool))


def budget_rate(budget: int, num_tokens: int) -> float:
  """Returns the rate at which a prompt meets a budget of tokens, `min(budget / num_tokens, 1)`.

  Args:
    budget: tokens of the target model to keep, at least 1.
    num_tokens: those of the whole prompt, over all its chunks.

  Raises:
    ValueError: for numbers below 1.

  >>> budget_rate(2000, 8000), budget_rate(2000, 500)
  (0.25, 1.0)
  """
  if budget < 1 or num_tokens < 1:
    raise ValueError(f'budget_rate: budget={budget}, num_tokens={num_tokens}; expected at least 1.')
  return min(budget / num_tokens, 1.0)


def keep_threshold(probabilities: ArrayLike, num_llm_tokens: ArrayLike, rate: float) -> float:
  """Returns the probability above which words stay, so that some `rate` of the target's tokens do.

  The percentile (linear interpolation) at the level `int(100 (1 - rate) + 1)` of the words' probabilities,
  each repeated for its tokens of the target model. The `+ 1` keeps a little less than `rate`.

  Args:
    probabilities: `[words]`.
    num_llm_tokens: integers `[words]`, tokens of the target model; words of 0 tokens do not count.
    rate: tau, kept / original tokens, in (0, 1].

  Raises:
    ValueError: for a rate out of range, arrays that do not fit, or no token at all.

  Source: LLMLingua-2's code, in float64 as there: at 0.9 the level is 10, by rounding.

  >>> round(keep_threshold([0.1, 0.2, 0.3, 0.4], [1, 1, 1, 1], 0.5), 3)
  0.253
  """
  values, counts = _checked('keep_threshold', probabilities, num_llm_tokens, rate)
  repeated = np.repeat(values, counts)
  if not repeated.size:
    raise ValueError('keep_threshold: expected at least one word of at least one token.')
  return float(np.percentile(repeated, min(int(100 * (1 - rate) + 1), 100)))


def select_words(
  merged: PromptWords,
  num_llm_tokens: ArrayLike,
  rate: float,
  *,
  force_tokens: Collection[str] = (),
  drop_consecutive: bool = False,
  at_least_one: bool = False,
) -> np.ndarray:
  """Returns which words of a chunk stay at a rate: those with a probability above `keep_threshold`.

  Strictly above, unless the threshold is 1: so words of one probability all go. At rate 1 all words stay.

  With `drop_consecutive` a forced token is dropped that repeats the forced token before it with no kept
  ordinary word between them (one above the percentile at the level `int(100 (1 - rate))` of the words, each
  counted once): its probability becomes 0 before the threshold is taken. So is one that equals the last kept
  word.

  Args:
    merged: words and probabilities, see `merge_words` (with the same forced tokens).
    num_llm_tokens: integers `[words]`, tokens of the target model.
    rate: tau in (0, 1]; see `budget_rate` for a budget.
    force_tokens: words that `drop_consecutive` is about.
    drop_consecutive: see above.
    at_least_one: keep the most probable word where none would stay; not in the official code.

  Returns:
    bool `[words]`; empty for no words.

  Raises:
    ValueError: for a rate out of range, arrays that do not fit, or words without any token.

  Source: LLMLingua-2's code.

  >>> words = PromptWords(
  ...   ('a', '.', '.', 'b', 'c'), np.array([0.9, 1, 1, 0.8, 0.1]), np.ones(5, bool)
  ... )
  >>> select_words(words, [1] * 5, 0.8, force_tokens=['.'], drop_consecutive=True).tolist()
  [True, True, False, True, True]
  """
  values, counts = _checked('select_words', merged.probabilities, num_llm_tokens, rate)
  if len(merged.words) != len(values):
    raise ValueError(f'select_words: {len(merged.words)} words for {len(values)} probabilities.')
  if rate == 1 or not len(values):
    return np.ones(len(values), bool)
  if drop_consecutive:
    values = _without_repeats(merged.words, values, rate, force_tokens)
  threshold = keep_threshold(values, counts, rate)
  keep = (values > threshold) | ((values == threshold) & (threshold == 1))
  if drop_consecutive:
    last = None
    for index in np.flatnonzero(keep):
      word = merged.words[index]
      keep[index] = not (word in force_tokens and word == last)
      last = word
  if at_least_one and not keep.any():
    keep[np.argmax(values)] = True
  return keep


def kept_text(merged: PromptWords, keep: ArrayLike) -> str:
  """Writes down the words that stay, in order, with the spaces that came before them.

  Texts of a prompt's chunks are to be concatenated as they are, and then stripped.

  Raises:
    ValueError: if `keep` is not one flag a word.

  >>> kept_text(
  ...   merge_words(['\u2581so', '\u2581be', '\u2581it', '.'], [0.5] * 4), [True, False, True, True]
  ... )
  ' so it.'
  """
  keep = np.asarray(keep, bool)
  if keep.shape != (len(merged.words),):
    raise ValueError(
      f'kept_text: keep {keep.shape} must be one flag for each of {len(merged.words)} words.'
    )
  rows = zip(merged.words, merged.spaced, keep, strict=True)
  return ''.join((' ' if space else '') + word for word, space, stays in rows if stays)


def _without_repeats(words, values, rate, force_tokens):
  """Returns probabilities that are 0 for forced tokens which repeat the one before them."""
  values = values.copy()
  threshold = np.percentile(values, int(100 * (1 - rate)))
  previous, between = None, False
  for index, word in enumerate(words):
    if word not in force_tokens:
      between |= bool(values[index] > threshold)
      continue
    if word == previous and not between:
      values[index] = 0.0
    previous, between = word, False
  return values


def _checked(name, probabilities, num_llm_tokens, rate):
  """Returns both as arrays, float64 and integer; raises ValueError for bad ones."""
  values, counts = np.asarray(probabilities, np.float64), np.asarray(num_llm_tokens)
  counts = counts if counts.size else counts.astype(np.int64)
  if not 0 < rate <= 1:
    raise ValueError(f'{name}: rate={rate} is not in (0, 1].')
  if values.ndim != 1 or not np.isfinite(values).all():
    raise ValueError(f'{name}: probabilities {values.shape} must be finite numbers [words].')
  if counts.shape != values.shape or counts.dtype.kind not in 'iu' or np.any(counts < 0):
    raise ValueError(
      f'{name}: num_llm_tokens, {counts.dtype} {counts.shape}, must be integers of at least 0, one for each '
      f'of {len(values)} words.'
    )
  return values, counts
