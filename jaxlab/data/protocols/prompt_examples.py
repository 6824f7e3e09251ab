"""Annotated texts as what a token classifier of prompts learns: pieces, and which of them to preserve.

EFPC (Cao et al. 2025, arXiv 2503.07956) on top of LLMLingua-2 (Pan et al. 2024, arXiv 2403.12968).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from jaxlab.data.protocols.prompt_annotation import (
  WordAnnotation,
  annotate_words,
  filter_annotations,
)
from jaxlab.data.sources.prompt_records import PromptRecord

if TYPE_CHECKING:
  from jaxlab.compression.prompt_inputs import TokenLayout

Lemmatizer = Callable[[Sequence[str]], Sequence[str]]


def split_words(text: str) -> tuple[list[str], np.ndarray]:
  """Returns the words of a text, runs of letters and digits and single signs but commas, and their places.

  The official script takes spaCy's tokens.

  Returns:
    The words, and int64 `[words, 2]`, where each begins and ends, in characters.

  >>> words, spans = split_words('Red, and old.')
  >>> words, spans.tolist()
  (['Red', 'and', 'old', '.'], [[0, 3], [5, 8], [9, 12], [12, 13]])
  """
  found = [own for own in re.finditer(r'\w+|[^\w\s]', text) if own.group() != ',']
  return [own.group() for own in found], np.array([own.span() for own in found], np.int64).reshape(
    -1, 2
  )


def annotate_text(
  text: str, compressed: str, *, window: int = 150, lemmatize: Lemmatizer | None = None
) -> tuple[WordAnnotation, np.ndarray]:
  """Returns which words of a text its compression keeps, and where each is; see `annotate_words`.

  Args:
    text: the text.
    compressed: the shorter one.
    window: see `annotate_words`.
    lemmatize: `words -> lemmas`, one a word, such as spaCy's; None: words as they are.

  Returns:
    The annotation of the words of `split_words`, and their places int64 `[words, 2]`.

  Raises:
    ValueError: for a text without words, or a lemmatizer that returns another number.
  """
  (words, spans), (kept, _) = split_words(text), split_words(compressed)
  if lemmatize is not None:
    words, kept = _lemmas(lemmatize, words), _lemmas(lemmatize, kept)
  return annotate_words(words, kept, window=window), spans


def _lemmas(lemmatize: Lemmatizer, words: Sequence[str]) -> list[str]:
  found = list(lemmatize(words)) if words else []
  if len(found) != len(words):
    raise ValueError(f'lemmatize returns {len(found)} lemmas for {len(words)} words.')
  return found


def piece_labels(
  labels: ArrayLike, num_pieces: ArrayLike, *, official_quirks: bool = False
) -> np.ndarray:
  """Returns the labels of `[begin, pieces of the words, end]`: each piece has its word's.

  Args:
    labels: bool `[words]`.
    num_pieces: integers `[words]`, pieces of each word.
    official_quirks: as LLMLingua-2's code inserts the label of the end: before the last piece's in place of
      behind it, so that the last piece has False and the end has the piece's label.

  Returns:
    bool `[1 + pieces + 1]`.

  Raises:
    ValueError: for vectors of different lengths.

  >>> piece_labels([False, True], [1, 2]).astype(int).tolist()
  [0, 0, 1, 1, 0]
  >>> piece_labels([False, True], [1, 2], official_quirks=True).astype(int).tolist()
  [0, 0, 1, 0, 1]
  """
  labels, counts = np.asarray(labels, bool), np.asarray(num_pieces, np.int64)
  if labels.ndim != 1 or labels.shape != counts.shape:
    raise ValueError(f'piece_labels: labels {labels.shape} and num_pieces {counts.shape}.')
  found = np.concatenate([[False], np.repeat(labels, counts), [False]])
  if official_quirks and len(found) > 2:
    found[[-2, -1]] = found[[-1, -2]]
  return found


def prompt_examples(
  records: Sequence[PromptRecord],
  tokenizer: Any,
  *,
  layout: TokenLayout | None = None,
  max_length: int = 512,
  max_instruction: int = 64,
  window: int = 150,
  percentile: float | None = None,
  lemmatize: Lemmatizer | None = None,
  official_quirks: bool = False,
) -> dict[str, np.ndarray]:
  """Returns what a token classifier is trained on: the chunks of annotated texts, with labels.

  Records with an instruction have it before each chunk. A piece is to be preserved if a kept word overlaps
  it.

  Args:
    records: texts with their compressions; two different ones of a text, with and without instruction, are
      two records.
    tokenizer: of the library tokenizers.
    layout: of the tokenizer; None: `token_layout`.
    max_length: of a sequence.
    max_instruction: see `classifier_input`.
    window: see `annotate_words`.
    percentile: leave out texts whose annotation went badly, see `filter_annotations`; None: none.
    lemmatize: see `annotate_text`.
    official_quirks: as LLMLingua-2's code does: lemmas are tokenized one by one, a text is one sequence and
      what does not fit is cut off, labels are those of `piece_labels(official_quirks=True)`, and `counted` is
      all but padding.

  Returns:
    `tokens` int32, `valid` bool, `segments` int32, `labels` int32 and `counted` bool, each
    `[examples, max_length]`; `counted` are the tokens of the texts.

  Raises:
    ValueError: for no records, a record without compression, texts without words.
  """
  if not len(records):
    raise ValueError('prompt_examples: expected at least one record.')
  from jaxlab.compression.prompt_inputs import (
    token_layout,
  )  # machines that read features load no networks

  layout = token_layout(tokenizer) if layout is None else layout
  options = {'window': window, 'lemmatize': lemmatize}
  annotated = []
  for index, record in enumerate(records):
    if not record.compressed:
      raise ValueError(f'prompt_examples: record {index} has no compressed text.')
    annotated.append(annotate_text(record.text, record.compressed, **options))
  chosen = np.arange(len(records))
  if percentile is not None:
    rates = np.array([(own.variation_rate, own.alignment_gap) for own, _ in annotated])
    chosen = filter_annotations(*rates.T, percentile=percentile)
  lengths = {'max_length': max_length, 'max_instruction': max_instruction}
  rows: dict[str, list[np.ndarray]] = {}
  for index in chosen.tolist():
    record, (annotation, spans) = records[index], annotated[index]
    if official_quirks:
      words, _ = split_words(record.text)
      words = words if lemmatize is None else _lemmas(lemmatize, words)
      found = [_word_by_word(record, words, annotation.labels, tokenizer, layout, lengths)]
    else:
      found = _by_chunks(record, spans[annotation.labels], tokenizer, layout, lengths)
    for row in found:
      for name, value in row.items():
        rows.setdefault(name, []).append(value)
  return {name: np.stack(values) for name, values in rows.items()}


def _by_chunks(record, kept, tokenizer, layout, lengths) -> Iterator[dict[str, np.ndarray]]:
  """Yields the sequences of a text's chunks; `kept` `[words, 2]` are the places of kept words."""
  characters = np.zeros(len(record.text) + 1, np.int64)
  for start, stop in kept.tolist():
    characters[start:stop] = 1
  before = np.concatenate([[0], np.cumsum(characters)])
  from jaxlab.compression.prompt_inputs import prompt_chunks

  for chunk in prompt_chunks(record.text, record.instruction, tokenizer, layout, **lengths):
    own, labels = chunk.inputs, np.zeros(lengths['max_length'], np.int32)
    labels[own.is_text] = before[chunk.offsets[:, 1]] > before[chunk.offsets[:, 0]]
    yield {
      'tokens': own.tokens, 'valid': own.mask, 'segments': own.segments, 'labels': labels,
      'counted': own.is_text,
    }  # fmt: skip


def _word_by_word(record, words, labels, tokenizer, layout, lengths) -> dict[str, np.ndarray]:
  """Returns the sequence of a text as LLMLingua-2's code makes it."""

  def encode(text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids

  pieces = [encode(word) for word in words]
  asked = encode(record.instruction)[: lengths['max_instruction']]
  room = lengths['max_length'] - 2 - (len(asked) + layout.separators if asked else 0)
  ids = [piece for own in pieces for piece in own][: max(room, 0)]
  from jaxlab.compression.prompt_inputs import classifier_input

  own = classifier_input(ids, asked, **layout.special, **lengths)
  marked = piece_labels(labels, [len(own) for own in pieces], official_quirks=True)
  places = np.flatnonzero(own.is_text)
  places = np.concatenate([[0], places, places[-1:] + 1])
  full = np.zeros(lengths['max_length'], np.int32)
  # What is cut off takes the shifted label of the end with it.
  full[places] = marked[: len(places)]
  return {
    'tokens': own.tokens, 'valid': own.mask, 'segments': own.segments, 'labels': full,
    'counted': own.mask,
  }  # fmt: skip
