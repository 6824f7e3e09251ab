"""Measures networks next to PyTorch's: each side in processes of its own, the two in turns.

A process builds one network, makes a first training step, and takes the least of several further ones and of
several forward passes; the least over rounds counts. A busy machine so disturbs both sides alike.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.tools import bench_side

HERE = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Case:
  """A network and what it is given.

  Attributes:
    network: its name in `jaxlab.models.create`.
    size: of the images in pixels, or of a text in tokens.
    batch: examples of a batch.
  """

  network: str
  size: int
  batch: int


CASES = {
  'resnet18_64': Case('resnet18', 64, 32),
  'resnet18_32': Case('resnet18', 32, 64),
  'mobilenetv2_224': Case('mobilenetv2_100', 224, 8),
  'resnet50_224': Case('resnet50', 224, 4),
  'swin_tiny_224': Case('swin_tiny_patch4_window7_224', 224, 4),
  'vit_tiny_224': Case('vit_tiny_patch16_224', 224, 8),
  'cifar_resnet18_32': Case('cifar_resnet18', 32, 64),
  'wrn16_4_32': Case('wrn16_4', 32, 64),
  'gpt2_128': Case('gpt2', 128, 2),
}
STANDARD = tuple(CASES)[:6]  # what is compared unless other networks are named


def interpreter(path: str) -> str:
  """Returns the Python at `path`, or in the environment at `path`, which has torch and timm.

  Raises:
    ValueError: if there is none, or it lacks one of them.
  """
  places = [pathlib.Path(path), pathlib.Path(path, 'bin', 'python')]
  found = next((place for place in places if place.is_file() and os.access(place, os.X_OK)), None)
  if found is None:
    raise ValueError(f'--torch-python={path}: expected a Python or the folder of an environment.')
  done = subprocess.run(
    [found, '-I', '-c', 'import torch, timm'], capture_output=True, text=True, check=False
  )
  if done.returncode:
    last = (done.stderr.strip() or f'exit status {done.returncode}').splitlines()[-1]
    raise ValueError(f'--torch-python={path}: expected an environment with torch and timm: {last}')
  return str(found.absolute())


def thread_counts(text: str) -> tuple[int | None, ...]:
  """Returns the numbers of threads in a list such as 'all,1'; None stands for all.

  Raises:
    ValueError: for what is no number of threads, or more than there are CPUs.
  """
  counts = []
  for part in text.split(','):
    if part != 'all' and not (part.isdecimal() and 1 <= int(part) <= bench_side.cpu_count()):
      raise ValueError(
        f"--threads={text}: expected 'all' or numbers from 1 to {bench_side.cpu_count()}."
      )
    counts.append(None if part == 'all' else int(part))
  return tuple(dict.fromkeys(counts))


def measure(
  cases: Sequence[str],
  threads: Sequence[int | None] = (None, 1),
  *,
  torch_python: str | None = None,
  rounds: int = 2,
  steps: int = 5,
  report: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
  """Returns, by case, `{'case', 'parameters', 'versions', 'rows'}`.

  `rows[name][side]` are the figures of a side, 'ours' or 'torch': `wall` and, of steps and passes, `cpu`
  seconds (of all threads together). `rows[name]['ratio']` is ours over PyTorch's of each. Rows: 'forward'
  and 'step' for all threads, 'forward, 1 thread' and so on for fewer; 'compile': of the step, nothing cached;
  'first step': from the start of the process until the first step is done, compilation included; 'first step,
  cached': the same with the compiled step in the cache (PyTorch's is its least).

  Args:
    cases: keys of `CASES`.
    threads: numbers of threads; None for all.
    torch_python: from `interpreter`; None: ours alone.
    rounds: processes of each side and number of threads.
    steps: timed steps and forward passes of each process.
    report: called with a line of text for each process that is done.

  Raises:
    RuntimeError: if a process fails, or the sides' networks differ in their number of parameters.
  """
  found = {}
  for name in cases:
    case = CASES[name]
    rows: dict[str, dict[str, dict[str, float]]] = {}
    done: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
      for index in range(rounds):
        for count in threads:
          for side in ('ours', 'torch') if torch_python else ('ours',):
            done[side] = run(side, case, count, steps, torch_python, cache)
            collect(rows, side, count, done[side]['figures'], cached=index > 0)
            report(
              f'{name}, {describe(count)}, {side}: {done[side]["figures"]["step"]["wall"]:.3f} s'
            )
    sizes = {side: figures['parameters'] for side, figures in done.items()}
    if len(set(sizes.values())) > 1:
      raise RuntimeError(f'{name}: the networks differ, numbers of parameters are {sizes}.')
    for row in rows.values():
      if len(row) == 2:
        row['ratio'] = {k: row['ours'][k] / row['torch'][k] for k in row['ours']}
    found[name] = {
      'case': dataclasses.asdict(case),
      'parameters': sizes['ours'],
      'versions': {k: v for figures in done.values() for k, v in figures['versions'].items()},
      'rows': {row: rows[row] for row in sorted(rows, key=_order)},
    }
  return found


def describe(count: int | None) -> str:
  """Returns 'all threads', '1 thread', '2 threads'."""
  return 'all threads' if count is None else f'{count} thread{"s" * (count > 1)}'


def collect(
  rows: dict[str, dict[str, dict[str, float]]],
  side: str,
  count: int | None,
  figures: Mapping[str, Mapping[str, float]],
  *,
  cached: bool,
) -> None:
  """Lowers what `rows` has of a side to the figures of one more process.

  What is compiled and started counts for all threads alone, the first time with an empty cache (`cached`:
  no longer).
  """
  for name, values in figures.items():
    if name in ('compile', 'first_step'):
      if count is not None or (cached and name == 'compile'):
        continue
      row = name.replace('_', ' ') + ', cached' * cached
    else:
      row = name if count is None else f'{name}, {describe(count)}'
    held = rows.setdefault(row, {}).setdefault(side, dict(values))
    rows[row][side] = {k: min(v, held[k]) for k, v in values.items()}


def _order(row: str) -> tuple[bool, bool, str]:
  return 'first' in row or row == 'compile', 'thread' in row, row


def run(
  side: str, case: Case, threads: int | None, steps: int, torch_python: str | None, cache: str
) -> dict[str, Any]:
  """Returns the figures that one process of a side prints; `cache` is the folder of what is compiled.

  Raises:
    RuntimeError: if it fails.
  """
  command = [sys.executable, '-m', 'experiments.tools.bench_models']
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': cache}
  if side == 'torch':
    command = [torch_python, '-I', str(HERE / 'bench_torch.py')]
    environment = dict(os.environ)
  for name, value in dataclasses.asdict(case).items() | {'steps': steps}.items():
    command.append(f'--{name}={value}')
  if threads is not None:
    command.append(f'--threads={threads}')
  command.append(f'--started={time.time()}')
  done = subprocess.run(
    command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise RuntimeError(f'{side}, {case}, {describe(threads)}: {done.stderr.strip()[-2000:]}')
  return json.loads(done.stdout.splitlines()[-1])
