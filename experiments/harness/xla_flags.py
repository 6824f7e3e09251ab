"""Compiler flags in `XLA_FLAGS`, each only where the installed XLA knows it.

An XLA that does not know a flag aborts the process, and flags come and go without notice. Whether this one
knows a flag is read from the library itself, which holds the names of its flags as C strings.
"""

import importlib.util
import json
import mmap
import os
import pathlib

CACHE = pathlib.Path.home() / '.cache' / 'jaxlab' / 'xla_flags.json'


def add(flag: str, value: str, names: str | None = None) -> bool:
  """Appends `--flag=value` to `XLA_FLAGS`; it counts where nothing of XLA has run yet in this process.

  Left as it is: a flag that the user has set, one that this XLA does not know, and one whose value it does
  not know.

  Args:
    flag: the flag's name, without dashes.
    value: what to set it to.
    names: the enum member that `value` stands for, where a value may be unknown even if the flag is not.

  Returns:
    Whether the flag was appended.

  >>> add('xla_gpu_no_such_flag', 'true')
  False
  """
  flags = os.environ.get('XLA_FLAGS', '')
  if any(part.partition('=')[0] == f'--{flag}' for part in flags.split()):
    return False
  # A C string with both ends: a flag that was given up lives on in a list of reserved names.
  if not _library_holds(f'\0{flag}\0') or (names and not _library_holds(names)):
    return False
  os.environ['XLA_FLAGS'] = f'{flags} --{flag}={value}'.strip()
  return True


def _library_holds(text: str) -> bool:
  """Returns whether jaxlib's compiled libraries hold `text`, remembered in `CACHE` for these very files.

  To find a text takes some 15 ms, to miss it ten times as long.
  """
  libraries = _libraries()
  stats = [(path, path.stat()) for path in libraries]
  key = ' '.join([*(f'{p}:{s.st_size}:{s.st_mtime_ns}' for p, s in stats), text])
  answers = _read_cache()
  if key not in answers:
    answers[key] = any(_file_holds(path, text.encode()) for path in libraries)
    _write_cache(answers)
  return answers[key]


def _libraries() -> list[pathlib.Path]:
  """Returns the shared libraries in which XLA may lie, the largest first."""
  spec = importlib.util.find_spec('jaxlib')
  if spec is None:
    return []
  files = pathlib.Path(spec.origin).parent.iterdir()
  compiled = (f for f in files if f.suffix in ('.so', '.dylib', '.dll', '.pyd'))
  sizes = {f: f.stat().st_size for f in compiled}
  return sorted((f for f in sizes if sizes[f] > 10e6), key=sizes.get, reverse=True)


def _file_holds(path: pathlib.Path, text: bytes) -> bool:
  with path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
    return content.find(text) >= 0


def _read_cache() -> dict[str, bool]:
  """Returns the answers in `CACHE`, none where it does not exist or is no such file."""
  try:
    answers = json.loads(CACHE.read_text())
  except (OSError, ValueError):
    return {}
  return answers if isinstance(answers, dict) else {}


def _write_cache(answers: dict[str, bool]) -> None:
  """Writes `CACHE`, whole or not at all; where nothing can be written, libraries are searched again."""
  draft = CACHE.with_suffix(f'.{os.getpid()}')
  try:
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(json.dumps(answers))
    draft.replace(CACHE)
  except OSError:
    pass
