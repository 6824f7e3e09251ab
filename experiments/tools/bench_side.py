"""What both sides of a comparison with PyTorch share: arguments, threads, timing, the line of figures.

The standard library alone: `bench_torch` runs under another Python, without this project's packages.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """Returns what one measuring process is told.

  `network` by its name in `jaxlab.models.create`, `size` (pixels, or tokens of a decoder), `batch`, `threads`
  (None: as many as there are), `steps` to take the least of, `started`: when the process was started, in
  seconds since the epoch.
  """
  parser = argparse.ArgumentParser()
  parser.add_argument('--network', required=True)
  for name in ('size', 'batch', 'steps'):
    parser.add_argument(f'--{name}', type=int, required=True)
  parser.add_argument('--threads', type=int)
  parser.add_argument('--started', type=float, required=True)
  return parser.parse_args(arguments)


def use_threads(count: int | None) -> None:
  """Leaves this process so many of its CPUs; libraries loaded later start as many threads.

  None leaves all. Systems that cannot bind a process to CPUs do without.
  """
  if count is not None and hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def cpu_count() -> int:
  """Returns how many CPUs this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def least(run: Callable[[], Any], steps: int, warm: int = 2) -> dict[str, float]:
  """Returns the least wall time and the least CPU time (all threads) of `run()`, in seconds.

  `run` waits until its result is there; the first `warm` calls are not counted.
  """
  walls, cpus = [], []
  for _ in range(warm + steps):
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    walls.append(time.perf_counter() - wall)
    cpus.append(time.process_time() - cpu)
  return {'wall': min(walls[warm:]), 'cpu': min(cpus[warm:])}


def say(figures: dict[str, Any]) -> None:
  """Prints the figures as the last line of the output."""
  print(json.dumps(figures), flush=True)
