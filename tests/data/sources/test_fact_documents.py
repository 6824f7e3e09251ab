import re

import numpy as np
import pytest

from jaxlab import data
from jaxlab.data.sources import fact_documents as facts

FACT = re.compile(r'The (\w+) of the (\w+) is (\w+)\.')
PLAIN = data.fact_documents('train', 40)
ASKED = data.fact_documents('train', 40, instructed=True)


def test_documents_hold_facts_among_prose():
  for record in (*PLAIN, *ASKED):
    stated = FACT.findall(record.text)
    sentences = re.findall(r'[^.]+\.', record.text)
    assert 4 <= len(stated) <= 8 and 10 <= len(sentences) <= 15
    assert len({fact[:2] for fact in stated}) == len({fact[2] for fact in stated}) == len(stated)
    for attribute, thing, value in stated:
      assert thing in facts.OBJECTS.split() and value in facts.VALUES[attribute].split()
  assert not any(record.instruction or record.answers for record in PLAIN)


def test_questions_are_on_a_fact_and_the_oracle_keeps_its_words():
  for record in ASKED:
    asked = [
      fact for fact in FACT.findall(record.text) if {*fact[:2]} < {*re.findall(r'\w+', record.instruction)}
    ]  # fmt: skip
    assert [fact[2] for fact in asked] == list(record.answers)
    kept = record.compressed.split()
    assert {*asked[0]} <= {*kept} <= {*asked[0]}
    assert kept.count(asked[0][1]) == len(re.findall(rf'\b{asked[0][1]}\b', record.text))


def test_without_a_question_the_rarest_words_stay_in_order():
  table = facts.word_frequency()
  for record in PLAIN[:10]:
    words, _ = data.split_words(record.text)
    size = len(words) + record.text.count(',')
    kept = record.compressed.split()
    assert len(kept) == int(0.25 * size)
    position = -1
    for word in kept:
      position = words.index(word, position + 1)
    rest = list(words)
    for word in kept:
      rest.remove(word)
    assert max(table[own.lower()] for own in kept) <= min(table[own.lower()] for own in rest)


def test_equal_seeds_give_equal_documents_and_splits_share_no_prose():
  assert data.fact_documents('train', 40) == PLAIN
  assert data.fact_documents('train', 40, seed=1) != PLAIN
  assert data.fact_documents('train', 20) == PLAIN[:20]
  assert PLAIN[0].text != ASKED[0].text
  test = {own for record in data.fact_documents('test', 20) for own in record.text.split('. ')}
  train = {own for record in PLAIN for own in record.text.split('. ')}
  assert not {own for own in test & train if not own.startswith('The ')}


def test_expected_frequencies_are_those_of_documents():
  counts: dict[str, int] = {}
  for record in data.fact_documents('train', 400):
    for word in data.split_words(record.text.lower())[0]:
      counts[word] = counts.get(word, 0) + 1
  table = facts.word_frequency()
  for word in ('color', 'lamp', 'crimson', 'beige', 'oak'):
    expected = 400 * table[word]
    assert abs(counts[word] - expected) < 4 * np.sqrt(expected) + 1, word


def test_edges_of_the_oracle():
  assert data.oracle_compress('', 'Who?') == '' and data.oracle_compress('one two') == ''
  text = 'The color of the lamp is red. Nothing else.'
  assert data.oracle_compress(text, 'Who came?') == ''
  assert data.oracle_compress(text, 'What is the COLOR of the lamp?', rate=0.5) == 'color lamp red'
  assert data.oracle_compress(text, 'What is the color of the lamp?', rate=0.2) == 'lamp red'
  with pytest.raises(ValueError, match=r'rate=0 is not in \(0, 1\]'):
    data.oracle_compress(text, rate=0)
  with pytest.raises(ValueError, match="split is 'valid'"):
    data.fact_documents('valid', 3)
  with pytest.raises(ValueError, match='count=0'):
    data.fact_documents('train', 0)
