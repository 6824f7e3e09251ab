"""Settings as frozen dataclasses: filled from plain values, and checked all at once.

A section is a frozen dataclass. Its annotations are the types, its defaults what a setting need not name,
and its `check` (if it has one) yields what is wrong with its values. A field made by `free` does not decide
what a run ends with; all others do (`identity`). Annotations may be int, float, str, bool, `Literal`,
`tuple[...]`, sections, `dict[str, section]`, `Mapping[str, Any]` (options that go on to a library function),
and unions of these.
"""

import dataclasses
import difflib
import functools
import json
import re
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
  if distinct := list(dict.fromkeys(found)):
    raise SettingsError(distinct)


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


def listed(value: Any) -> Any:
  """Returns plain values: sections as mappings, lists as tuples."""
  if dataclasses.is_dataclass(value):
    return listed(dataclasses.asdict(value))
  if isinstance(value, Mapping):
    return {k: listed(v) for k, v in value.items()}
  return tuple(map(listed, value)) if isinstance(value, (tuple, list)) else value


@functools.cache
def hints_of(cls: type) -> Mapping[str, Any]:
  """Returns the annotated types of a section's fields."""
  hints = typing.get_type_hints(cls)
  return types.MappingProxyType({f.name: hints[f.name] for f in dataclasses.fields(cls)})


def _fill(cls: type[T], values: Mapping[str, Any], path: str, problems: list[str]) -> T | None:
  values, hints = dict(values), hints_of(cls)
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
      problems.append(f'{path}{field.name}: missing; expected {named(hints[field.name])}.')
  given = {
    name: convert(hints[name], value, path + name, problems)
    for name, value in values.items()
    if name in hints
  }
  return cls(**given) if len(problems) == before else None


def convert(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
  """Returns `value` as `kind` has it (lists as tuples, mappings as sections, 1 as 1.0), or adds a problem."""
  options = typing.get_args(kind) if is_union(kind) else (kind,)
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
    return listed(value)
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
        convert(k, v, f'{path}[{i}]', problems) for i, (k, v) in enumerate(zip(kinds, value))
      )
  is_mapping = isinstance(origin, type) and issubclass(origin, Mapping)
  if is_mapping and isinstance(value, Mapping):
    return {k: convert(arguments[1], v, f'{path}.{k}', problems) for k, v in value.items()}
  problems.append(_mismatch(path, kind, value))
  return None


def _mismatch(path: str, kind: Any, value: Any) -> str:
  return f'{path}={value!r}: expected {named(kind)}, got {type(value).__name__}.'


def is_union(kind: Any) -> bool:
  """Returns whether a type is a union of others."""
  return typing.get_origin(kind) in (typing.Union, types.UnionType)


def named(kind: Any) -> str:
  """Returns a type as messages name it."""
  if typing.get_origin(kind) is typing.Literal:
    return f'one of {", ".join(map(repr, typing.get_args(kind)))}'
  if kind is type(None):
    return 'none'
  if is_union(kind):
    return ' or '.join(map(named, typing.get_args(kind)))
  if isinstance(kind, type) and not typing.get_args(kind):
    return kind.__name__
  return re.sub(r'(\w+\.)+', '', str(kind))
