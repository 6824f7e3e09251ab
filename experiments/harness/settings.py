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
import functools
import json
import os
import re
import shlex
import types
import typing
import warnings
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


def override(
  cls: type, values: Mapping[str, Any], changes: Sequence[str] | Mapping[str, Any]
) -> dict[str, Any]:
  """Returns plain `values` of the section `cls` with changes put in.

  Args:
    cls: the section.
    values: plain values.
    changes: `key.sub=text` pairs, or values by key; texts are read by the key's type. Lists may come as a
      shell leaves them: `runs=["a","b"]`, `runs=[a,b]`, `runs=a,b`, `seeds=0`.

  Raises:
    SettingsError: for keys that do not exist (with the closest that do) and texts of another type.
  """
  values, problems = overridden(cls, values, changes)
  require(problems)
  return values


def overridden(
  cls: type, values: Mapping[str, Any], changes: Sequence[str] | Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
  """Returns `override`'s values with those changes put in that can be, and what is wrong with the others."""
  problems, values = [], _copied(values)
  keys = _keys(cls, values)
  texts = not isinstance(changes, Mapping)
  for change in changes:
    key, separator, text = change.partition('=') if texts else (change, '=', '')
    kind = _type_at(cls, values, key.split('.'))
    if not separator:
      problems.append(f'--config.{change}: expected --config.key=value.')
    elif kind is None:
      close = difflib.get_close_matches(key, keys, 3, 0.4)
      hint = f'Did you mean {", ".join(close)}?' if close else f'Keys: {", ".join(keys)}.'
      problems.append(f'--config.{key}: unknown key. {hint}')
    else:
      try:
        text = text if texts else changes[key]
        text = os.fspath(text) if isinstance(text, os.PathLike) else text
        value = parse(text, kind) if isinstance(text, str) else text
        _put(values, key.split('.'), _opened(value), cls)
      except ValueError as error:
        problems.append(f'--config.{key}={text}: {error}')
  return values, problems


def parse(text: str, kind: Any) -> Any:
  """Returns the value that a text stands for, of type `kind`.

  Lists and mappings may have lost the quotes of their words, as a shell takes them away.

  >>> parse('[a,b]', tuple[str, ...]), parse('(1, 2)', tuple[int, int]), parse('none', float | None)
  (('a', 'b'), (1, 2), None)
  >>> parse('[[a,none],[b,2]]', tuple[tuple[str, int | None], ...]), parse('{a:[b,c]}', Any)
  ((('a', None), ('b', 2)), {'a': ('b', 'c')})

  Raises:
    ValueError: if it stands for none.
  """
  kinds = typing.get_args(kind) if _is_union(kind) else (kind,)
  wrapped = text.strip()[:1] + text.strip()[-1:] in ('[]', '()', '{}')
  if str in kinds:
    tried = [None] * (text in ('none', 'None') and type(None) in kinds) + [text]
  else:
    tried = [_unquoted(text, _literal)] * wrapped + [_literal(text), text]
    tried += [_unquoted(text if wrapped else f'[{text}]', word) for word in (_literal, _word)]
  for value in tried:
    found: list[str] = []
    converted = _convert(kind, value, '', found)
    if not found:
      return converted
  raise ValueError(f'expected {_named(kind)}')


def _literal(text: str) -> Any:
  """Returns the Python value that a text is, or else the text."""
  names = {'true': True, 'false': False, 'none': None, 'inf': float('inf'), '-inf': float('-inf')}
  if text in names:
    return names[text]
  with contextlib.suppress(ValueError, SyntaxError, TypeError), warnings.catch_warnings():
    warnings.simplefilter('ignore', SyntaxWarning)  # `1if`
    return ast.literal_eval(text)
  return _word(text)


def _word(text: str) -> str:
  return text.strip().strip('\'"')


def _unquoted(text: str, word: Callable[[str], Any]) -> Any:
  """Returns a list or mapping, `[a,[b,none]]` or `{a:1}`; `word` reads what is neither."""
  text = text.strip()
  ends = text[:1] + text[-1:]
  if ends in ('[]', '()'):
    return tuple(_unquoted(part, word) for part in _parts(text[1:-1]))
  if ends == '{}':
    pairs = [part.partition(':')[::2] for part in _parts(text[1:-1])]
    return {_word(name): _unquoted(value, word) for name, value in pairs}
  return word(text)


def _parts(text: str) -> list[str]:
  """Returns what stands between the commas that are in no brackets or quotes."""
  parts, depth, quote = [''], 0, ''
  for before, letter in zip(f',{text}', text):
    if letter == quote or (not quote and letter in '\'"' and not before.isalnum()):
      quote = '' if quote else letter
    depth += 0 if quote else (letter in '[({') - (letter in '])}')
    if letter == ',' and not depth and not quote:
      parts.append('')
    else:
      parts[-1] += letter
  return [part.strip() for part in parts if part.strip()]


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


def entries(config: Any) -> Iterator[tuple[str, str]]:
  """Yields every key of a section with its value as a text that `parse` reads."""

  def leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if dataclasses.is_dataclass(value):
      value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping) and value:
      for name, child in value.items():
        yield from leaves(child, f'{path}.{name}' if path else name)
    else:
      yield path, value if isinstance(value, str) else _written(_listed(value))

  return leaves(config, '')


def assignments(config: Any, leave_out: Sequence[str] = ()) -> list[str]:
  """Returns `--config.key=value` of every key but some, quoted for a shell."""
  pairs = [pair for pair in entries(config) if pair[0] not in leave_out]
  return [shlex.quote(f'--config.{key}={text}') for key, text in pairs]


def _listed(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    return _listed(dataclasses.asdict(value))
  if isinstance(value, Mapping):
    return {k: _listed(v) for k, v in value.items()}
  return tuple(map(_listed, value)) if isinstance(value, (tuple, list)) else value


def _written(value: Any) -> str:
  """Returns a text that `parse` reads; strings within have double quotes, for a shell's single ones."""
  if isinstance(value, str):
    return json.dumps(value, ensure_ascii=False)
  if isinstance(value, float) and value in (float('inf'), -float('inf')):
    return '1e999' if value > 0 else '-1e999'  # Python has no other literal for it
  if isinstance(value, tuple):
    return f'[{", ".join(map(_written, value))}]'
  if isinstance(value, Mapping):
    return f'{{{", ".join(f"{_written(k)}: {_written(v)}" for k, v in value.items())}}}'
  return repr(value)


def _copied(values: Any) -> Any:
  return {k: _copied(v) for k, v in values.items()} if isinstance(values, Mapping) else values


def _opened(value: Any) -> Any:
  """Returns a section as a mapping, and those within, so that later changes find its fields."""
  if dataclasses.is_dataclass(value):
    return {f.name: _opened(getattr(value, f.name)) for f in dataclasses.fields(value)}
  return {k: _opened(v) for k, v in value.items()} if isinstance(value, Mapping) else value


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
  hints = typing.get_type_hints(cls)
  return types.MappingProxyType({f.name: hints[f.name] for f in dataclasses.fields(cls)})


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


def _put(values: dict[str, Any], keys: Sequence[str], value: Any, kind: Any) -> None:
  """Puts in a value; a section that is not there starts as the default of its field."""
  for index, name in enumerate(keys[:-1]):
    if not isinstance(values.get(name), dict):
      given = values[name] if name in values else _default(_type_at(kind, {}, keys[:index]), name)
      values[name] = _changed(given) if dataclasses.is_dataclass(given) else {}
    values = values[name]
  values[keys[-1]] = value


def _default(kind: Any, name: str) -> Any:
  """Returns the default of the field `name` of a section."""
  for option in typing.get_args(kind) if _is_union(kind) else (kind,):
    for field in dataclasses.fields(option) if dataclasses.is_dataclass(option) else ():
      if field.name == name:
        return _own(field)
  return None


def _changed(section: Any) -> dict[str, Any]:
  """Returns the fields in which a section differs from the defaults of its class."""
  values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
  own = {field.name: _own(field) for field in dataclasses.fields(section)}
  return {name: value for name, value in values.items() if value != own[name]}


def _own(field: dataclasses.Field) -> Any:
  factory = field.default_factory
  return field.default if factory is dataclasses.MISSING else factory()
