"""Texts with what a teacher shortened them to: records, and the file that holds them."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple


class PromptRecord(NamedTuple):
  """A text with a shorter one that a teacher made of it.

  Attributes:
    text: the text.
    compressed: the shorter text; '': not known.
    instruction: what it was shortened for; '' for nothing in particular.
    answers: texts, any one of which a good answer to the instruction needs; empty: not known.
  """

  text: str
  compressed: str = ''
  instruction: str = ''
  answers: tuple[str, ...] = ()


def read_prompts(path: str | os.PathLike) -> list[PromptRecord]:
  """Returns the records of a file of JSON lines.

  A line is an object with `text` and, as far as they are known, `compressed`, `instruction` (texts) and
  `answers` (a list of texts):

    {"text": "The color of the lamp is red. It is old.", "compressed": "color lamp red",
     "instruction": "What is the color of the lamp?", "answers": ["red"]}

  Empty lines are passed over.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for a file without records or in another encoding than UTF-8, and for a line of another form,
      with its number.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: there is no such file. Expected JSON lines with text, compressed, and, where known, '
      'instruction and answers (jaxlab.data.read_prompts).'
    )
  found = []
  try:
    with path.open(encoding='utf-8') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          found.append(_record(f'{path}:{number}', line))
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is no text in UTF-8: {error}.') from error
  if not found:
    raise ValueError(f'{path} holds no records.')
  return found


def write_prompts(path: str | os.PathLike, records: Sequence[PromptRecord]) -> None:
  """Writes records as `read_prompts` reads them."""
  lines = [
    json.dumps(
      {name: value for name, value in record._asdict().items() if value}, ensure_ascii=False
    )
    for record in records
  ]
  pathlib.Path(path).write_text('\n'.join(lines) + '\n', encoding='utf-8')


def _record(where: str, line: str) -> PromptRecord:
  try:
    entries: Any = json.loads(line)
  except ValueError as error:
    raise ValueError(f'{where} is no JSON: {error}.') from error
  if not isinstance(entries, dict) or not isinstance(entries.get('text'), str):
    raise ValueError(f'{where}: expected an object with the text under "text".')
  if unknown := sorted(entries.keys() - set(PromptRecord._fields)):
    raise ValueError(f'{where}: unknown entries {unknown}; expected {PromptRecord._fields}.')
  answers = entries.pop('answers', [])
  texts = [*entries.values(), *(answers if isinstance(answers, list) else [None])]
  if not all(isinstance(value, str) for value in texts) or not entries['text'].strip():
    raise ValueError(
      f'{where}: expected texts, of which "text" is not empty, and a list of texts under "answers".'
    )
  return PromptRecord(**entries, answers=tuple(answers))
