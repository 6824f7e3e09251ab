"""Making a prompt small: which of its words stay, by the probabilities of a token classifier.

`merge_words` turns probabilities of sub-words into those of words, `select_words` keeps the most probable
ones, `kept_text` writes them down; `select_contexts` leaves out whole documents before. EFPC (Cao et al.
2025, arXiv 2503.07956) on top of LLMLingua-2 (Pan et al. 2024, arXiv 2403.12968), whose selection it takes
over. What the classifier reads is laid out in `prompt_inputs`; `prompt_compressor` does all of it.

The rest of this room shrinks networks, these files what they read. Host code in NumPy and strings; the labels
of the classifier are made in `jaxlab.data.protocols.prompt_annotation`.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

WORD_MARKER = '\u2581'  # SentencePiece's mark of a piece that begins a word
SPECIAL_TOKENS = (
  '<s>', '</s>', '<unk>', '<pad>', '<mask>', '[CLS]', '[SEP]', '[UNK]', '[PAD]', '[MASK]',
)  # fmt: skip


class PromptWords(NamedTuple):
  """Words of a chunk, merged from a tokenizer's pieces.

  Attributes:
    words: without the marker.
    probabilities: float64 `[words]`, of being preserved.
    spaced: bool `[words]`, true where the marker (a space) came before the word.
    pieces: int `[words, 2]`, each word's first piece and the one behind its last, among all of the chunk;
      None: not known.
  """

  words: tuple[str, ...]
  probabilities: np.ndarray
  spaced: np.ndarray
  pieces: np.ndarray | None = None


def merge_words(
  tokens: Sequence[str],
  probabilities: ArrayLike,
  *,
  force_tokens: Collection[str] = (),
  reserve_digits: bool = False,
  reduce: str = 'mean',
  special_tokens: Collection[str] = SPECIAL_TOKENS,
  marker: str = WORD_MARKER,
  continuation: str = '',
) -> PromptWords:
  """Merges sub-words into words, with the mean probability of their pieces or that of the first one.

  A piece begins a word if it starts with the marker, is one ASCII punctuation character, or is a forced
  token; the others are appended to the word before (the first piece of a chunk begins one in any case, where
  the official code fails). With `continuation` a piece begins a word unless it starts with that; what was
  between words in the text is then not told by pieces, and all that begin one are `spaced`. Forced tokens,
  compared without marker and continuation, have probability 1, and with `reserve_digits` every piece with a
  digit has. Forced are pieces, as in the official code, not words of several: `compress_prompt` forces those.

  Args:
    tokens: pieces of a chunk.
    probabilities: `[pieces]`, of being preserved.
    force_tokens: pieces to keep whatever their probability.
    reserve_digits: keep digits likewise.
    reduce: `'mean'` or `'first'`.
    special_tokens: pieces that are skipped.
    marker: what begins a word.
    continuation: what a piece inside of a word begins with, '##' of WordPiece; then there is no marker.

  Raises:
    ValueError: for probabilities that are not one of [0, 1] a piece, an empty forced token, or another
      `reduce`.

  Source: LLMLingua-2's code; the rule of '##' is inferred.

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
  words, spaced, own, places = [], [], [], []
  for place, (token, value) in enumerate(zip(tokens, values.tolist())):
    if token in special_tokens:
      continue
    if continuation:
      bare = token.removeprefix(continuation)
      after_space = not token.startswith(continuation)
    else:
      bare = token.removeprefix(marker)
      after_space = token.startswith(marker)
    punctuation = len(token) == 1 and token in string.punctuation
    begins = after_space or punctuation or bare in force_tokens
    reserved = reserve_digits and any(map(str.isdecimal, token))
    if begins or not words:
      words.append(bare)
      spaced.append(after_space)
      own.append([1.0 if reserved or bare in force_tokens else value])
      places.append([place, place + 1])
    else:
      words[-1] += bare
      own[-1].append(1.0 if reserved else value)
      places[-1][1] = place + 1
  means = [np.mean(pieces) if reduce == 'mean' else pieces[0] for pieces in own]
  return PromptWords(
    tuple(words),
    np.array(means, np.float64),
    np.array(spaced, bool),
    np.array(places, np.int64).reshape(-1, 2),
  )


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


def select_contexts(probabilities: Sequence[ArrayLike], rate: float) -> np.ndarray:
  """Returns which of many documents stay before their words are looked at: those of probable words.

  Documents stay whose mean word probability is at least the percentile (linear interpolation) at the level
  `int(100 (1 - r))` of all means, with r = (rate + 1) / 2. One always stays.

  Args:
    probabilities: of the words of each document; a document without words has mean 0.
    rate: tau of the words, in (0, 1].

  Raises:
    ValueError: for a rate out of range, no document, or probabilities that are not finite.

  Source: LLMLingua-2's code (level and mean); that documents at the percentile stay is inferred.

  >>> select_contexts([[0.1, 0.3], [0.9], [0.5, 0.5], [0.4]], 0.5).tolist()
  [False, True, True, True]
  """
  if not 0 < rate <= 1:
    raise ValueError(f'select_contexts: rate={rate} is not in (0, 1].')
  if not len(probabilities):
    raise ValueError('select_contexts: expected at least one document.')
  own = [np.asarray(values, np.float64) for values in probabilities]
  means = np.array([values.mean() if values.size else 0.0 for values in own])
  if not np.isfinite(means).all():
    raise ValueError('select_contexts: probabilities must be finite numbers.')
  return means >= np.percentile(means, int(100 * (1 - (rate + 1) / 2)))


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
