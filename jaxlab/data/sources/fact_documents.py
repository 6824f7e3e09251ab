"""Documents that state facts among other sentences, questions on them, and what an oracle would keep of both.

What a prompt compressor can be trained and judged on without a teacher: a sentence such as "The color of the
lamp is crimson." answers the question "What is the color of the lamp?", and the oracle knows it. The other
sentences are prose that comes with Python.
"""

from __future__ import annotations

import collections
import functools
import re
import zlib

import numpy as np

from jaxlab.data.sources.prompt_records import PromptRecord
from jaxlab.data.sources.sentences import sentences
from jaxlab.data.sources.text import python_reference

# Attributes with the values that they take, from frequent to rare.
VALUES = {
  'color': 'crimson amber violet teal ivory scarlet olive maroon indigo beige',
  'material': 'oak marble bronze linen leather glass granite bamboo velvet steel',
  'owner': 'Anna Boris Clara David Emma Felix Greta Hugo Irene Jonas',
  'origin': 'Norway Peru Kenya Japan Chile Egypt India Spain Cuba Nepal',
  'place': 'attic cellar kitchen garden studio library garage balcony chapel stable',
  'shape': 'round oval square conical flat curved hollow slender crooked domed',
  'month': 'January February March April June July August October November December',
  'maker': 'Adler Brandt Castro Dumont Eklund Fischer Garner Hansen Keller Lopez',
}
OBJECTS = (
  'lamp chair clock carpet mirror piano kettle wagon ladder barrel violin statue basket bottle candle '
  'blanket drum anchor wallet helmet globe easel vase trunk'
)
QUESTIONS = (
  'What is the {attribute} of the {object}?',
  'Which {attribute} does the {object} have?',
  'Tell me the {attribute} of the {object}.',
)
_FACT = 'The {attribute} of the {object} is {value}.'
_WORD = re.compile(r'\w+|[^\w\s]')
_LENGTHS = range(5, 11)  # words of the other sentences
_FACTS = (4, 8)  # of a document, least and most
_SENTENCES = (10, 15)


def fact_documents(
  split: str, count: int, *, instructed: bool = False, rate: float = 0.25, seed: int = 0
) -> list[PromptRecord]:
  """Returns documents of 10 to 15 sentences, 4 to 8 of which state a fact, shortened by an oracle.

  Attributes and objects are drawn evenly, values by Zipf's law (the k-th with a chance of 1 / k): some are
  frequent, most rare. No two facts of a document are on the same attribute of an object, and no value occurs
  twice. The other sentences are those of `python_reference` of 5 to 10 words without digits and signs; those
  of the test split are others than those of the training split.

  Args:
    split: 'train' or 'test'.
    count: documents.
    instructed: shorten for a question on one of the facts, see `oracle_compress`; the record then has the
      question and its answer.
    rate: of the oracle.
    seed: of all that is drawn.

  Returns:
    Records. Equal arguments give equal records, on equal versions of Python.

  Raises:
    ValueError: for an unknown split, or a count below 1.

  >>> found = fact_documents('train', 2, instructed=True)[0]
  >>> found.answers[0] in found.text and found.answers[0] in found.compressed
  True
  """
  if split not in ('train', 'test'):
    raise ValueError(f"split is {split!r}, expected 'train' or 'test'.")
  if count < 1:
    raise ValueError(f'fact_documents: count={count}, expected at least 1.')
  rng = np.random.default_rng([seed, split == 'test', instructed])
  fillers, objects = _fillers(split), OBJECTS.split()
  return [_document(rng, fillers, objects, instructed, rate) for _ in range(count)]


def _document(rng, fillers, objects, instructed, rate) -> PromptRecord:
  """Returns a drawn document."""
  size, facts = (rng.integers(low, high + 1) for low, high in (_SENTENCES, _FACTS))
  pairs = rng.choice(len(VALUES) * len(objects), facts, replace=False)
  stated, taken = [], set()
  for pair in pairs.tolist():
    attribute = list(VALUES)[pair % len(VALUES)]
    values = VALUES[attribute].split()
    # The order of draws without replacement with chances 1 / k.
    order = np.argsort(rng.exponential(np.arange(1, len(values) + 1)))
    value = next(values[index] for index in order if values[index] not in taken)
    taken.add(value)
    stated.append({'attribute': attribute, 'object': objects[pair // len(VALUES)], 'value': value})
  own = [fillers[index] for index in rng.permutation(len(fillers))[: size - facts]]
  own += [_FACT.format(**fact) for fact in stated]
  text = ' '.join(own[index] for index in rng.permutation(size))
  if not instructed:
    return PromptRecord(text, oracle_compress(text, rate=rate))
  asked = stated[rng.integers(facts)]
  question = QUESTIONS[rng.integers(len(QUESTIONS))].format(**asked)
  short = oracle_compress(text, question, rate=rate)
  return PromptRecord(text, short, question, (asked['value'],))


def oracle_compress(text: str, instruction: str = '', *, rate: float = 0.25) -> str:
  """Returns the words of a document that an oracle keeps, in order.

  Without instruction the `int(rate * words)` rarest words, by how often a document is expected to hold them
  (`word_frequency`); of equally rare ones the longer, then the earlier. With one attribute, object and value
  in the sentence that the question is on, then both words of the question wherever else they stand, nothing
  else, and no more than without.

  Args:
    text: of `fact_documents`, or any other: what is no fact is never asked for.
    instruction: a question on a fact, or any other text; '' for none.
    rate: share of the words that stay, punctuation counted as words, in (0, 1].

  Raises:
    ValueError: for a rate out of range.

  >>> text = 'The color of the vase is red. The owner of the lamp is Anna.'
  >>> oracle_compress(text, 'What is the owner of the lamp?')
  'owner lamp Anna'
  """
  if not 0 < rate <= 1:
    raise ValueError(f'oracle_compress: rate={rate} is not in (0, 1].')
  found = list(_WORD.finditer(text))
  words = [own.group() for own in found]
  asked = {own.lower() for own in _WORD.findall(instruction)}
  wanted = np.full(len(words), 2)
  facts = re.finditer(r'The (\w+) of the (\w+) is (\w+)\.', text)
  starts = {own.start(): index for index, own in enumerate(found)}
  for fact in facts:
    attribute, thing, _ = (own.lower() for own in fact.groups())
    for index, word in enumerate(words if attribute in asked and thing in asked else ()):
      if word.lower() in (attribute, thing):
        wanted[index] = min(wanted[index], 1)
    if attribute in asked and thing in asked:
      wanted[[starts[fact.start(group)] for group in (1, 2, 3)]] = 0
  table = word_frequency()
  frequency = [table.get(word.lower(), 0.0 if word.isalpha() else np.inf) for word in words]
  lengths = [-len(word) for word in words]
  order = np.lexsort([np.arange(len(words)), lengths, frequency, wanted])
  kept = np.sort(order[: int(rate * len(words))])
  if asked:
    kept = kept[wanted[kept] < 2]
  return ' '.join(words[index] for index in kept)


@functools.cache
def word_frequency() -> dict[str, float]:
  """Returns how often a document of `fact_documents` is expected to hold each word, in lower case."""
  found: dict[str, float] = collections.defaultdict(float)
  facts = sum(_FACTS) / 2
  own = [*_fillers('train'), *_fillers('test')]
  for sentence in own:
    for word in _WORD.findall(sentence.lower()):
      found[word] += (sum(_SENTENCES) / 2 - facts) / len(own)
  for word in ('the', 'the', 'of', 'is', '.'):
    found[word] += facts
  for word in OBJECTS.split():
    found[word] += facts / len(OBJECTS.split())
  for attribute, values in VALUES.items():
    found[attribute] += facts / len(VALUES)
    chances = 1 / np.arange(1, len(values.split()) + 1)
    for value, chance in zip(values.lower().split(), chances / chances.sum()):
      found[value] += facts / len(VALUES) * chance
  return dict(found)


@functools.cache
def _fillers(split: str) -> tuple[str, ...]:
  """Returns the split's sentences that are no facts: a fifth of all, by a checksum, is the test split's."""
  values = {word.lower() for own in VALUES.values() for word in own.split()}
  taken = {*VALUES, *OBJECTS.split(), *values}
  return tuple(
    own
    for own in sentences(python_reference())
    if re.fullmatch(r"[A-Z][A-Za-z,' -]*\.", own)
    and len(own.split()) in _LENGTHS
    and taken.isdisjoint(_WORD.findall(own.lower()))
    and (zlib.crc32(own.encode()) % 5 == 0) == (split == 'test')
  )
