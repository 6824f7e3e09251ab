"""Which words of a text were kept in its compression: the labels that a prompt compressor learns from.

A teacher shortens a text by leaving words out, but no teacher is exact: it moves words, repeats them, changes
their case, adds some. `annotate_words` lays what it wrote against the text, `filter_annotations` leaves out
the texts where that went badly, `mix_instructed` adds some texts that were shortened for an instruction.
LLMLingua-2 (Pan et al. 2024, arXiv 2403.12968), whose rule EFPC (arXiv 2503.07956) takes over.

Host code on lists of words. It stands here, not next to the selection of words
(`jaxlab.compression.prompts`), because it makes labels and says which records a training sees.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class WordAnnotation(NamedTuple):
  """Labels of a text's words, and how well the compressed text fits them.

  Attributes:
    labels: bool `[words]`, true for kept ones.
    compression_rate: compressed words / original words.
    variation_rate: share of compressed words that the text does not have.
    hitting_rate: compressed words that the text has / original words.
    matching_rate: kept words / original words, the mean label.
    alignment_gap: `hitting_rate - matching_rate`: words that are there and were not found in their place.
  """

  labels: np.ndarray
  compression_rate: float
  variation_rate: float
  hitting_rate: float
  matching_rate: float
  alignment_gap: float


def annotate_words(
  original: Sequence[str], compressed: Sequence[str], *, window: int = 150
) -> WordAnnotation:
  """Finds the words of a compressed text in the original, each at most once, in both directions.

  Each compressed word takes the next unlabeled original word that equals it but for case, at distance
  i = 0, 1, ..., window - 1 from where the previous one was found, forwards before backwards: at
  `min(previous + i, words - 1)`, then at `max(previous - i, 0)`. A word found ahead moves that place to
  itself, or by `window // 2` if it is further away; one found behind always to itself. Words that are not
  found are left out. A word counts as present, in the rates, if the text or its lower-cased words hold it as
  it is, or in lower case.

  Args:
    original: words of the text. The official script passes spaCy's lemmas without commas.
    compressed: words of the shortened text, made the same way.
    window: how far a word is looked for, W; the official script runs with 400.

  Returns:
    The labels and rates. Without compressed words all are 0.

  Raises:
    ValueError: for a text without words, a string in the place of a list of words, or a window below 1.

  Source: LLMLingua-2's annotation code, used by EFPC.

  >>> found = annotate_words(
  ...   'the motion of the council and the Mayor'.split(), 'motion mayor passed'.split()
  ... )
  >>> found.labels.astype(int).tolist(), found.matching_rate, found.alignment_gap
  ([0, 1, 0, 0, 0, 0, 0, 1], 0.25, 0.0)
  >>> round(found.variation_rate, 3)
  0.333
  """
  for name, words in (('original', original), ('compressed', compressed)):
    if isinstance(words, str):
      raise ValueError(f'annotate_words: {name} is a string, expected a list of words.')
  if window < 1:
    raise ValueError(f'annotate_words: window={window}, expected at least 1.')
  if not len(original):
    raise ValueError('annotate_words: original is empty, expected at least one word.')
  lower = [word.lower() for word in original]
  vocabulary = {*original, *lower}
  hits = sum(word in vocabulary or word.lower() in vocabulary for word in compressed)
  labels = np.zeros(len(lower), bool)
  previous = 0
  for word in compressed:
    place = _nearest(word.lower(), lower, labels, previous, window)
    if place is not None:
      labels[place] = True
      too_far = place - previous > window // 2
      previous = previous + window // 2 if too_far else place
  hitting, matching = hits / len(lower), float(labels.sum()) / len(lower)
  return WordAnnotation(
    labels=labels,
    compression_rate=len(compressed) / len(lower),
    variation_rate=1 - hits / len(compressed) if len(compressed) else 0.0,
    hitting_rate=hitting,
    matching_rate=matching,
    alignment_gap=hitting - matching,
  )


def _nearest(word, words, taken, start, window):
  """Returns where the free `word` nearest to `start` is, ahead before behind, or None."""
  for distance in range(window):
    for place in (min(start + distance, len(words) - 1), max(start - distance, 0)):
      if words[place] == word and not taken[place]:
        return place
  return None


def filter_annotations(
  variation_rates: ArrayLike, alignment_gaps: ArrayLike, *, percentile: float = 90.0
) -> np.ndarray:
  """Returns which annotated texts to keep: those below a percentile of both rates, in two rounds.

  Texts with `variation_rate >= percentile of all` go first; then, of the rest, those with
  `alignment_gap >= percentile of the rest's`. A round whose percentile is the smallest rate there is would
  leave nothing (most teachers add no word to most texts): it is passed over, with a warning.

  Args:
    variation_rates: `[texts]`, see `WordAnnotation`.
    alignment_gaps: `[texts]`.
    percentile: in (0, 100], of linear interpolation.

  Returns:
    Increasing indices, int64 `[kept]`.

  Raises:
    ValueError: for rates that are not finite vectors of one length, no text, or a percentile out of range.

  Source: LLMLingua-2's code, which leaves nothing in the case above.

  >>> filter_annotations(
  ...   [0.5, 0.0, 0.1, 0.2, 0.3], [0.0, 0.2, 0.0, 0.1, 0.3], percentile=80
  ... ).tolist()
  [1, 2, 3]
  """
  rates = {
    'variation_rates': np.asarray(variation_rates, np.float64),
    'alignment_gaps': np.asarray(alignment_gaps, np.float64),
  }
  shapes = [values.shape for values in rates.values()]
  if len(shapes[0]) != 1 or shapes[0] != shapes[1] or not shapes[0][0]:
    raise ValueError(
      f'filter_annotations: variation_rates {shapes[0]} and alignment_gaps {shapes[1]} must be [texts], '
      'of one length and not empty.'
    )
  if not 0 < percentile <= 100:
    raise ValueError(f'filter_annotations: percentile={percentile} is not in (0, 100].')
  kept = np.arange(shapes[0][0])
  for name, values in rates.items():
    if not np.isfinite(values).all():
      raise ValueError(f'filter_annotations: {name} has values that are not finite.')
    threshold = np.percentile(values[kept], percentile)
    if threshold == values[kept].min():
      warnings.warn(
        f'filter_annotations: percentile {percentile:g} of {name} is their minimum {threshold:g}; '
        'no text is left out for it.',
        stacklevel=2,
      )
      continue
    kept = kept[values[kept] < threshold]
  return kept


def mix_instructed(
  rng: np.random.Generator, num_plain: int, num_instructed: int, rate: float
) -> np.ndarray:
  """Returns the order of a training on texts without and with an instruction.

  All plain texts and `round(rate * num_plain)` of the instructed ones, drawn without replacement and shuffled
  together: so many more data, of which EFPC reports 1 % and 10 %.

  Args:
    rng: NumPy generator; advanced.
    num_plain: texts that were compressed without an instruction.
    num_instructed: texts at hand that were compressed for one.
    rate: instructed texts for one plain text, at least 0.

  Returns:
    int64 `[num_plain + drawn]`, indices of the plain texts followed by the instructed ones: below `num_plain`
    a plain text, else instructed text `index - num_plain`.

  Raises:
    ValueError: for a negative rate, no plain text, or fewer instructed texts than are to be drawn.

  Source: EFPC, abstract (the proportion; that both kinds are shuffled into one set is inferred).

  >>> order = mix_instructed(np.random.default_rng(0), 200, 50, 0.1)
  >>> len(order), int((order >= 200).sum())
  (220, 20)
  """
  if num_plain < 1:
    raise ValueError(f'mix_instructed: num_plain={num_plain}, expected at least 1.')
  if not rate >= 0:
    raise ValueError(f'mix_instructed: rate={rate}, expected at least 0.')
  count = round(rate * num_plain)
  if count > num_instructed:
    raise ValueError(
      f'mix_instructed: rate={rate} of num_plain={num_plain} asks for {count} instructed texts, '
      f'num_instructed={num_instructed}.'
    )
  drawn = num_plain + rng.permutation(num_instructed)[:count]
  return rng.permutation(np.concatenate([np.arange(num_plain), drawn]))
