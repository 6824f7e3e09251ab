"""One process, one work directory: a second one is told who is there before it changes anything."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from jaxlab.parallel import is_primary

try:
  import fcntl
except ImportError:  # a system without such locks
  fcntl = None

FILE = '.lock'


@contextlib.contextmanager
def locked(workdir: epath.PathLike) -> Iterator[None]:
  """Holds the directory for the time of a `with` block, for this job alone.

  The lock is the operating system's, on `<workdir>/.lock`: it ends with the process, however that ends, so a
  directory is never left locked. On buckets, and on file systems that know no such locks, nothing is held.

  Args:
    workdir: made if it is not there.

  Raises:
    ValueError: if another process holds it, on this or, where the file system tells, on another machine;
      names process, machine and since when. With several processes the first one takes the lock, and all
      raise. Also if the directory cannot be written.
  """
  with contextlib.ExitStack() as stack:
    problem = _take(workdir, stack) if is_primary() else ''
    if jax.process_count() > 1:
      failed = multihost_utils.process_allgather(np.asarray(bool(problem)))
      problem = problem or (f'workdir={str(workdir)!r} is in use.' if np.any(failed) else '')
    if problem:
      raise ValueError(problem)
    yield


def _take(workdir: epath.PathLike, stack: contextlib.ExitStack) -> str:
  """Takes the lock until `stack` ends, and returns '', or what is in the way."""
  if fcntl is None or '://' in str(workdir):
    return ''
  folder = pathlib.Path(workdir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context((folder / FILE).open('a+'))
  except OSError as error:
    return f'workdir={str(workdir)!r} cannot be written: {error}.'
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return (
      f'workdir={str(workdir)!r} is in use by {_owner(file)}. Wait for its end, stop it, or choose another '
      'directory.'
    )
  except OSError:
    return ''
  since = datetime.datetime.now().isoformat(' ', 'seconds')
  file.truncate(0)
  file.write(json.dumps({'process': os.getpid(), 'machine': socket.gethostname(), 'since': since}))
  file.flush()
  return ''


def _owner(file: Any) -> str:
  file.seek(0)
  try:
    return 'process {process} on {machine}, since {since}'.format(**json.loads(file.read()))
  except (ValueError, KeyError):  # it is being written
    return 'another process'
