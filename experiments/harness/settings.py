"""Settings as frozen dataclasses: filled from plain values, overridden by key, checked all at once.

A section is a frozen dataclass. Its annotations are the types, its defaults what a setting need not name,
and its `check` (if it has one) yields what is wrong with its values. A field made by `free` does not decide
what a run ends with; all others do (`identity`). Annotations may be int, float, str, bool, `Literal`,
`tuple[...]`, sections, `dict[str, section]`, `Mapping[str, Any]` (options that go on to a library function),
and unions of these.
"""

import ast
import contextlib
import dataclasses
import difflib
import json
import re
import shlex
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar('T')


class SettingsError(ValueError):
  """All that is wrong with some settings."""

  def __init__(self, problems: Sequence[str]):
    super().__init__('\n  '.join(problems) if len(problems) == 1 else '\n  '.join(['', *problems]))
    self.problems = tuple(problems)


def free(default: Any = dataclasses.MISSING, **options: Any) -> Any:
  """Returns a dataclass field that a run may be resumed under another value of."""
  if default is not dataclasses.MISSING:
    options['default'] = default
  return dataclasses.field(metadata={'decides': False}, **options)


def section(cls: type[T]) -> T:
  """Returns a field whose default is the section with its own defaults."""
  return dataclasses.field(default_factory=cls)


def fill(cls: type[T], values: Mapping[str, Any]) -> T:
  """Returns the section `cls` with `values`, defaults elsewhere.

  A class may have a classmethod `complete(values) -> values`, which puts in what follows from other values.

  Raises:
    SettingsError: naming every key that does not exist or is missing, and every value of another type.
  """
  problems: list[str] = []
  filled = _fill(cls, values, '', problems)
  if problems:
    raise SettingsError(problems)
  return filled


def problems(config: Any, path: str = '') -> Iterator[str]:
  """Yields what the `check` of every section in `config` finds, with the keys' full names."""
  if isinstance(config, Mapping):
    for name, value in config.items():
      yield from problems(value, f'{path}{name}.')
  elif dataclasses.is_dataclass(config):
    for field in dataclasses.fields(config):
      yield from problems(getattr(config, field.name), f'{path}{field.name}.')
    for problem in config.check() if hasattr(config, 'check') else ():
      yield path + problem


def found_by(what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[str]:
  """Yields `what: message` if the function raises ValueError (or TypeError, KeyError)."""
  try:
    function(*args, **kwargs)
  except (ValueError, TypeError, KeyError) as error:
    yield f'{what}: {error}'


def require(found: Iterable[str]) -> None:
  """Raises SettingsError if there is a problem."""
  if listed := list(dict.fromkeys(found)):
    raise SettingsError(listed)


def override(cls: type, values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
  """Returns plain `values` of the section `cls` with `key.sub=text` pairs put in, read by their type.

  Lists may come as a shell leaves them: `runs=["a","b"]`, `runs=[a,b]`, `runs=a,b`, `seeds=0`.

  Raises:
    SettingsError: for keys that do not exist (with the closest that do) and texts of another type.
  """
  problems, values = [], _copied(values)
  keys = _keys(cls, values)
  for assignment in assignments:
    key, separator, text = assignment.partition('=')
    kind = _type_at(cls, values, key.split('.'))
    if not separator:
      problems.append(f'--config.{assignment}: expected --config.key=value.')
    elif kind is None:
      close = difflib.get_close_matches(key, keys, 3, 0.4)
      hint = f'Did you mean {", ".join(close)}?' if close else f'Keys: {", ".join(keys)}.'
      problems.append(f'--config.{key}: unknown key. {hint}')
    else:
      try:
        _put(values, key.split('.'), parse(text, kind))
      except ValueError as error:
        problems.append(f'--config.{key}={text}: {error}')
  if problems:
    raise SettingsError(problems)
  return values


def parse(text: str, kind: Any) -> Any:
  """Returns the value that a text stands for, of type `kind`.

  >>> parse('[a,b]', tuple[str, ...]), parse('(1, 2)', tuple[int, int]), parse('none', float | None)
  (('a', 'b'), (1, 2), None)

  Raises:
    ValueError: if it stands for none.
  """
  names = {'true': True, 'false': False, 'none': None, 'True': True, 'False': False, 'None': None}
  tried = []
  if text in names:
    tried.append(names[text])
  with contextlib.suppress(ValueError, SyntaxError):
    tried.append(ast.literal_eval(text))
    tried.append((tried[-1],))
  tried.append(text)
  if not text.lstrip().startswith('{'):
    inner = text.strip()
    inner = inner[1:-1] if inner[:1] + inner[-1:] in ('[]', '()') else inner
    items = [item.strip().strip('\'"') for item in inner.split(',')]
    tried.append(tuple(item for item in items if item))
  kinds = typing.get_args(kind) if _is_union(kind) else (kind,)
  if str in kinds:
    tried = [text] + [None] * (text in ('none', 'None') and type(None) in kinds)
    tried.reverse()
  for value in tried:
    found: list[str] = []
    converted = _convert(kind, value, '', found)
    if not found:
      return converted
  raise ValueError(f'expected {_named(kind)}')


def identity(config: Any) -> Any:
  """Returns the fields that decide what a run ends with, as plain values: all but those made by `free`."""
  if isinstance(config, Mapping):
    return {name: identity(value) for name, value in config.items()}
  if isinstance(config, (tuple, list)):
    return [identity(value) for value in config]
  if not dataclasses.is_dataclass(config):
    return config
  return {
    field.name: identity(getattr(config, field.name))
    for field in dataclasses.fields(config)
    if field.metadata.get('decides', True)
  }


def plain(config: Any) -> Any:
  """Returns all fields as JSON has them."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def assignments(config: Any) -> list[str]:
  """Returns `--config.key=value` of every key, quoted for a shell."""

  def leaves(value: Any, path: str) -> Iterator[str]:
    if dataclasses.is_dataclass(value):
      value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping) and value:
      for name, child in value.items():
        yield from leaves(child, f'{path}.{name}')
    else:
      text = value if isinstance(value, str) else _written(_listed(value))
      yield shlex.quote(f'--config{path}={text}')

  return list(leaves(config, ''))


def _listed(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    return _listed(dataclasses.asdict(value))
  if isinstance(value, Mapping):
    return {k: _listed(v) for k, v in value.items()}
  return tuple(map(_listed, value)) if isinstance(value, (tuple, list)) else value


def _written(value: Any) -> str:
  """Returns a literal, also of infinity, which Python has no literal for but 1e999."""
  if isinstance(value, float) and value in (float('inf'), -float('inf')):
    return '1e999' if value > 0 else '-1e999'
  if isinstance(value, tuple):
    return f'({", ".join(map(_written, value))}{"," * (len(value) == 1)})'
  if isinstance(value, Mapping):
    return f'{{{", ".join(f"{k!r}: {_written(v)}" for k, v in value.items())}}}'
  return repr(value)


def _copied(values: Any) -> Any:
  return {k: _copied(v) for k, v in values.items()} if isinstance(values, Mapping) else values


def _hints(cls: type) -> dict[str, Any]:
  return {f.name: typing.get_type_hints(cls)[f.name] for f in dataclasses.fields(cls)}


def _fill(cls: type[T], values: Mapping[str, Any], path: str, problems: list[str]) -> T | None:
  values, hints = dict(values), _hints(cls)
  if hasattr(cls, 'complete'):
    try:
      values = cls.complete(values)
    except ValueError as error:
      problems.append(f'{path}{error}')
  before = len(problems)
  for name in values:
    if name not in hints:
      close = difflib.get_close_matches(name, hints, 3, 0.4) or sorted(hints)
      problems.append(f'{path}{name}: unknown key; expected {", ".join(close)}.')
  for field in dataclasses.fields(cls):
    required = field.default is field.default_factory is dataclasses.MISSING
    if field.name not in values and required:
      problems.append(f'{path}{field.name}: missing; expected {_named(hints[field.name])}.')
  given = {
    name: _convert(hints[name], value, path + name, problems)
    for name, value in values.items()
    if name in hints
  }
  return cls(**given) if len(problems) == before else None


def _convert(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
  """Returns `value` as `kind` has it (lists as tuples, mappings as sections, 1 as 1.0), or adds a problem."""
  options = typing.get_args(kind) if _is_union(kind) else (kind,)
  inner: list[str] = []
  for option in options:
    found: list[str] = []
    converted = _convert_to(option, value, path, found)
    if not found:
      return converted
    if found != [
      _mismatch(path, option, value)
    ]:  # the value is of this kind, something within is not
      inner = found
  problems += inner or [_mismatch(path, kind, value)]
  return None


def _convert_to(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if kind is Any:
    return _listed(value)
  if kind in (None, type(None)) and value is None:
    return None
  if origin is typing.Literal and value in arguments:
    return value
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if isinstance(kind, type) and kind in (int, float, str, bool) and type(value) is kind:
    return value
  if dataclasses.is_dataclass(kind):
    if isinstance(value, kind):
      return value
    if isinstance(value, Mapping):
      return _fill(kind, value, f'{path}.' if path else '', problems)
  if origin is tuple and isinstance(value, (tuple, list)):
    several = len(arguments) == 2 and arguments[1] is ...
    if several or len(arguments) == len(value):
      kinds = (arguments[0],) * len(value) if several else arguments
      return tuple(
        _convert(k, v, f'{path}[{i}]', problems) for i, (k, v) in enumerate(zip(kinds, value))
      )
  is_mapping = isinstance(origin, type) and issubclass(origin, Mapping)
  if is_mapping and isinstance(value, Mapping):
    return {k: _convert(arguments[1], v, f'{path}.{k}', problems) for k, v in value.items()}
  problems.append(_mismatch(path, kind, value))
  return None


def _mismatch(path: str, kind: Any, value: Any) -> str:
  return f'{path}={value!r}: expected {_named(kind)}, got {type(value).__name__}.'


def _is_union(kind: Any) -> bool:
  return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _named(kind: Any) -> str:
  if typing.get_origin(kind) is typing.Literal:
    return f'one of {", ".join(map(repr, typing.get_args(kind)))}'
  if kind is type(None):
    return 'none'
  if _is_union(kind):
    return ' or '.join(map(_named, typing.get_args(kind)))
  if isinstance(kind, type) and not typing.get_args(kind):
    return kind.__name__
  return re.sub(r'(\w+\.)+', '', str(kind))


def _type_at(kind: Any, value: Any, keys: Sequence[str]) -> Any:
  """Returns the annotated type behind `keys`, None if there is no such key."""
  if not keys:
    return kind
  name, rest = keys[0], keys[1:]
  child = value.get(name) if isinstance(value, Mapping) else None
  for option in typing.get_args(kind) if _is_union(kind) else (kind,):
    if dataclasses.is_dataclass(option) and name in _hints(option):
      return _type_at(_hints(option)[name], child, rest)
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    if isinstance(origin, type) and issubclass(origin, Mapping):
      if arguments[1] is Any:
        return Any if not rest or isinstance(child, Mapping) else None
      if isinstance(value, Mapping) and name in value:
        return _type_at(arguments[1], child, rest)
    if option is Any:
      return Any
  return None


def _keys(kind: Any, value: Any, path: str = '') -> list[str]:
  """Returns all keys of a section, those of mappings as far as `value` has them."""
  for option in typing.get_args(kind) if _is_union(kind) else (kind,):
    children = {}
    if dataclasses.is_dataclass(option):
      children = _hints(option)
    elif isinstance(value, Mapping):
      inner = (typing.get_args(option) or (Any, Any))[1]
      children = dict.fromkeys(value, inner)
    if children:
      below = value if isinstance(value, Mapping) else {}
      found = [_keys(k, below.get(n), f'{path}.{n}' if path else n) for n, k in children.items()]
      return [key for keys in found for key in keys]
  return [path]


def _put(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
  for name in keys[:-1]:
    if not isinstance(values.get(name), dict):
      values[name] = {}
    values = values[name]
  values[keys[-1]] = value
