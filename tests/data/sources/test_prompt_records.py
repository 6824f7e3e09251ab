import pytest

from jaxlab import data
from jaxlab.data import PromptRecord

RECORDS = [
  PromptRecord('The lamp is red.', 'lamp red', 'What is red?', ('lamp', 'the lamp')),
  PromptRecord('Ünd so weiter.\nNew line'),
]


def test_what_is_written_is_read(tmp_path):
  data.write_prompts(tmp_path / 'a.jsonl', RECORDS)
  assert data.read_prompts(tmp_path / 'a.jsonl') == RECORDS
  with (tmp_path / 'a.jsonl').open('a') as file:
    file.write('\n{"text": "more"}\n')
  assert data.read_prompts(tmp_path / 'a.jsonl')[2] == PromptRecord('more')


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('', 'holds no records'),
    ('{"text": ', 'a.jsonl:2 is no JSON'),
    ('["text"]', 'a.jsonl:2: expected an object with the text'),
    ('{"compressed": "a"}', 'expected an object with the text'),
    ('{"text": " "}', '"text" is not empty'),
    ('{"text": "a", "answers": "b"}', 'a list of texts under "answers"'),
    ('{"text": "a", "instruction": 3}', 'a.jsonl:2: expected texts'),
    ('{"text": "a", "answer": "b"}', r"unknown entries \['answer'\]"),
  ],
)
def test_lines_of_another_form_are_named(line, message, tmp_path):
  (tmp_path / 'a.jsonl').write_text(f'\n{line}\n')
  with pytest.raises(ValueError, match=message):
    data.read_prompts(tmp_path / 'a.jsonl')


def test_a_file_of_another_encoding_is_named(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes('{"text": "\xe9"}'.encode('latin-1'))
  with pytest.raises(ValueError, match=r'a\.jsonl is no text in UTF-8'):
    data.read_prompts(tmp_path / 'a.jsonl')


def test_a_file_that_is_not_there_says_what_it_would_hold(tmp_path):
  with pytest.raises(FileNotFoundError, match='JSON lines with text, compressed'):
    data.read_prompts(tmp_path / 'a.jsonl')
