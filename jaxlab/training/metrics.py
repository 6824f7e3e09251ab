"""Where a run's numbers go: JSON lines, TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

FILE = 'metrics.jsonl'


def read_metrics(workdir: epath.PathLike, last_step: int | None = None) -> list[dict[str, Any]]:
  """Returns the rows that a run has written to `<workdir>/metrics.jsonl`, each with its `step`.

  Args:
    workdir: the run's directory; without a file there is no row.
    last_step: leave out what was written after this step.
  """
  path = epath.Path(workdir) / FILE
  rows = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      continue  # the line at which the process was killed
  return [row for row in rows if last_step is None or row['step'] <= last_step]


class MetricWriter:
  """Writes rows of numbers to `<workdir>/metrics.jsonl`, and those that are finite to TensorBoard.

  A run that goes on from step `n` first drops the rows after `n`: it will write them again.

  Attributes:
    rows: all rows, those of earlier runs in the directory included.
  """

  def __init__(self, workdir: epath.PathLike | None, start: int = 0):
    """Opens the files; with `workdir=None` rows are kept in memory only."""
    self.rows: list[dict[str, Any]] = []
    self._path = self._board = None
    if workdir is None:
      return
    from tensorboardX import SummaryWriter

    self.rows = read_metrics(workdir, start)
    self._path = epath.Path(workdir) / FILE
    self._path.write_text(''.join(map(_line, self.rows)))
    self._appendable = '://' not in str(workdir)
    self._board = SummaryWriter(str(workdir), purge_step=start + 1 if start else None)

  def write(self, step: int, values: Mapping[str, float]) -> dict[str, Any]:
    """Adds the row `{'step': step, **values}` and returns it."""
    row = {'step': step, **{name: float(value) for name, value in values.items()}}
    self.rows.append(row)
    if self._path is not None:
      if self._appendable:
        with self._path.open('a') as file:
          file.write(_line(row))
      # NaN is what a step does not measure; the board would warn of each.
      for name in filter(lambda name: math.isfinite(row[name]), values):
        self._board.add_scalar(name, row[name], step)
    return row

  def flush(self) -> None:
    """Brings all rows to disk. Object stores cannot append: there the file is written anew."""
    if self._path is not None:
      if not self._appendable:
        self._path.write_text(''.join(map(_line, self.rows)))
      self._board.flush()

  def close(self) -> None:
    """Flushes and closes the files."""
    self.flush()
    if self._board is not None:
      self._board.close()


def _line(row: Mapping[str, Any]) -> str:
  return json.dumps(row) + '\n'


class Progress:
  """Shows how far a run is: a bar on a terminal, plain lines elsewhere. A context manager."""

  def __init__(self, description: str, start: int, num_steps: int, *, visible: bool = True):
    """Starts the clock at step `start` of `num_steps`; shows nothing if not `visible`."""
    from rich.console import Console

    self._description, self._num_steps = description, num_steps
    self._visible = visible
    self._console = Console(file=sys.stdout)
    self._bar = self._task = None
    self._begin = self._mark = (start, time.perf_counter())
    self._start = start

  def __enter__(self) -> Progress:
    if self._visible and self._console.is_terminal:
      from rich import progress

      self._bar = progress.Progress(
        progress.TextColumn('{task.description}', markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn('{task.fields[numbers]}', markup=False),
        console=self._console,
      )
      self._task = self._bar.add_task(
        self._description, total=self._num_steps, completed=self._start, numbers=''
      )
      self._bar.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._bar is not None:
      self._bar.stop()

  def advance(self, step: int) -> None:
    """Moves the bar. The clock of `rate` starts after the first step: it compiles."""
    if step == self._start + 1:
      self._begin = self._mark = (step, time.perf_counter())
    if self._bar is not None:
      self._bar.update(self._task, completed=step)

  def rate(self, step: int) -> dict[str, float]:
    """Returns `{'steps_per_second': ...}` since the last call; `{}` right after the first step."""
    (before, then), now = self._mark, time.perf_counter()
    self._mark = (step, now)
    return {'steps_per_second': (step - before) / (now - then)} if step > before else {}

  def pause(self, seconds: float) -> None:
    """Leaves `seconds`, spent on something else than steps, out of `rate`."""
    step, then = self._mark
    self._mark = (step, then + seconds)

  def show(self, step: int, values: Mapping[str, float], order: Sequence[str] = ('loss',)) -> None:
    """Shows a row's numbers, those of `order` first."""
    if not self._visible:
      return
    first = [name for name in order if name in values]
    names = [*first, *(name for name in values if name not in (*order, 'step'))]
    numbers = '  '.join(f'{name} {values[name]:.4g}' for name in names)
    if self._bar is not None:
      self._bar.update(self._task, numbers=numbers)
      return
    (first, then), now = self._begin, time.perf_counter()
    left = (self._num_steps - step) * (now - then) / (step - first) if step > first else math.nan
    remaining = f'  {_clock(left)} left' if step < self._num_steps and math.isfinite(left) else ''
    text = f'{time.strftime("%H:%M:%S")} {self._description} {step}/{self._num_steps}  {numbers}'
    print(text + remaining, flush=True)

  def say(self, text: str) -> None:
    """Prints a line without disturbing the bar."""
    if self._visible:
      console = self._bar.console if self._bar is not None else self._console
      console.print(text, highlight=False, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
  hours, rest = divmod(round(seconds), 3600)
  return f'{hours}:{rest // 60:02d}:{rest % 60:02d}'
