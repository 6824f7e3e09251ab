"""Settings as a command line has them: changed by key, read from text by type, written as text again."""

import ast
import contextlib
import dataclasses
import difflib
import json
import os
import shlex
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments.harness.settings import convert, hints_of, is_union, listed, named, require


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
  problems, given, values = [], values, _copied(values)
  keys = _keys(cls, values)
  texts = not isinstance(changes, Mapping)
  for change in changes:
    key, separator, text = change.partition('=') if texts else (change, '=', '')
    kind = _type_at(cls, values, key.split('.')) or _type_at(cls, given, key.split('.'), new=True)
    if not separator:
      problems.append(f'--config.{change}: expected --config.key=value.')
    elif kind is None:
      section, _, _ = key.rpartition('.')
      inner = _type_at(cls, given, section.split('.'), new=True)
      inner = hints_of(inner) if dataclasses.is_dataclass(inner) else ()
      near = [*keys, *(f'{section}.{name}' for name in inner)]
      close = difflib.get_close_matches(key, dict.fromkeys(near), 3, 0.4)
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
    ValueError: if it stands for none; names what within a list or mapping is of another type.
  """
  kinds = typing.get_args(kind) if is_union(kind) else (kind,)
  wrapped = text.strip()[:1] + text.strip()[-1:] in ('[]', '()', '{}')
  if str in kinds:
    tried = [None] * (text in ('none', 'None') and type(None) in kinds) + [text]
  else:
    tried = [_unquoted(text, _literal)] * wrapped + [_literal(text), text]
    tried += [_unquoted(text if wrapped else f'[{text}]', word) for word in (_literal, _word)]
  within: list[str] = []
  for value in tried:
    found: list[str] = []
    converted = convert(kind, value, '', found)
    if not found:
      return converted
    # Of the text as a whole there is no path.
    within = within or [
      own.removeprefix('.') for own in found if wrapped and not own.startswith('=')
    ]
  raise ValueError(f'expected {named(kind)}{"; " * bool(within)}{" ".join(within)}')


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


def entries(config: Any) -> Iterator[tuple[str, str]]:
  """Yields every key of a section with its value as a text that `parse` reads."""

  def leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if dataclasses.is_dataclass(value):
      value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping) and value:
      for name, child in value.items():
        yield from leaves(child, f'{path}.{name}' if path else name)
    else:
      yield path, value if isinstance(value, str) else _written(listed(value))

  return leaves(config, '')


def assignments(config: Any, leave_out: Sequence[str] = ()) -> list[str]:
  """Returns `--config.key=value` of every key but some, quoted for a shell."""
  pairs = [pair for pair in entries(config) if pair[0] not in leave_out]
  return [shlex.quote(f'--config.{key}={text}') for key, text in pairs]


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


def _type_at(kind: Any, value: Any, keys: Sequence[str], new: bool = False) -> Any:
  """Returns the annotated type behind `keys`, None if there is no such key.

  With `new` any entry of a mapping that holds none exists, too, if it is a section that needs no value. Where
  there are entries, a mistyped name adds none.
  """
  if not keys:
    return kind
  name, rest = keys[0], keys[1:]
  child = value.get(name) if isinstance(value, Mapping) else None
  for option in typing.get_args(kind) if is_union(kind) else (kind,):
    if dataclasses.is_dataclass(option) and name in hints_of(option):
      if not (isinstance(value, Mapping) and name in value):
        child = _started(_default(option, name))
      return _type_at(hints_of(option)[name], child, rest, new)
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    if isinstance(origin, type) and issubclass(origin, Mapping):
      if arguments[1] is Any:
        return Any if not rest or isinstance(child, Mapping) else None
      held = isinstance(value, Mapping) and name in value
      if held or (new and not value and _optional(arguments[1])):
        return _type_at(arguments[1], child, rest, new)
    if option is Any:
      return Any
  return None


def _optional(kind: Any) -> bool:
  """Returns whether a type is a section all of whose fields have defaults."""
  fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
  missing = dataclasses.MISSING
  return bool(fields) and not any(
    field.default is missing and field.default_factory is missing for field in fields
  )


def _keys(kind: Any, value: Any, path: str = '') -> list[str]:
  """Returns all keys of a section, those of mappings as far as `value` has them."""
  for option in typing.get_args(kind) if is_union(kind) else (kind,):
    children = {}
    if dataclasses.is_dataclass(option):
      children = hints_of(option)
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
      values[name] = _started(given)
    values = values[name]
  values[keys[-1]] = value


def _default(kind: Any, name: str) -> Any:
  """Returns the default of the field `name` of a section."""
  for option in typing.get_args(kind) if is_union(kind) else (kind,):
    for field in dataclasses.fields(option) if dataclasses.is_dataclass(option) else ():
      if field.name == name:
        return _own(field)
  return None


def _started(given: Any) -> dict[str, Any]:
  """Returns what a section, or a mapping of some, is as plain values before changes are put in."""
  if dataclasses.is_dataclass(given):
    return _changed(given)
  if isinstance(given, Mapping):
    return {
      name: _started(own) if dataclasses.is_dataclass(own) else own for name, own in given.items()
    }
  return {}


def _changed(section: Any) -> dict[str, Any]:
  """Returns the fields in which a section differs from the defaults of its class."""
  values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
  own = {field.name: _own(field) for field in dataclasses.fields(section)}
  return {name: value for name, value in values.items() if value != own[name]}


def _own(field: dataclasses.Field) -> Any:
  factory = field.default_factory
  return field.default if factory is dataclasses.MISSING else factory()
