"""Tests over tables and long lists: every row, column and kind in each run, every case with `-m ''`."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import pytest


def chosen(value: Any, always: bool) -> Any:
  """Returns a parameter (a tuple: of several arguments), marked exhaustive unless it runs `always`."""
  values = value if isinstance(value, tuple) else (value,)
  return pytest.param(*values, marks=() if always else pytest.mark.exhaustive)


def some(values: Iterable[Any], every: int) -> Iterator[Any]:
  """Yields all values; all but each `every`-th are marked exhaustive."""
  for index, value in enumerate(values):
    yield chosen(value, index % every == 0)


def first(values: Iterable[Any], number: int = 1) -> Iterator[Any]:
  """Yields all values; all behind the first `number` are marked exhaustive."""
  for index, value in enumerate(values):
    yield chosen(value, index < number)


def few(values: Iterable[Any], *always: Any) -> list[Any]:
  """Returns all values; those that are not among `always`, which must be values, are marked exhaustive."""
  values = list(values)
  if missing := [own for own in always if own not in values]:
    raise ValueError(f'{missing} are none of {values}')
  return [chosen(value, value in always) for value in values]


def cells(
  rows: Sequence[Any], columns: Sequence[Any], every: int, always: Collection[Any] = ()
) -> Iterator[Any]:
  """Yields pairs; all but each `every`-th diagonal and the columns `always` are marked exhaustive."""
  for i, row in enumerate(rows):
    for j, column in enumerate(columns):
      yield chosen((row, column), column in always or (i + j) % every == 0)
