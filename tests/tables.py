"""Tests over tables: every row and every column in each run, every cell with `-m ''`."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pytest


def some(values: Sequence[Any], every: int) -> Iterator[Any]:
  """Yields all values; all but each `every`-th are marked exhaustive."""
  for index, value in enumerate(values):
    yield pytest.param(value, marks=pytest.mark.exhaustive if index % every else ())


def cells(
  rows: Sequence[Any], columns: Sequence[Any], every: int, always: Collection[Any] = ()
) -> Iterator[Any]:
  """Yields pairs; all but each `every`-th diagonal and the columns `always` are marked exhaustive."""
  for i, row in enumerate(rows):
    for j, column in enumerate(columns):
      marks = () if column in always or (i + j) % every == 0 else pytest.mark.exhaustive
      yield pytest.param(row, column, marks=marks)
