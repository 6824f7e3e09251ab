"""Trees of parameters by module path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import traverse_util

PyTree = Any


def leaf_at(tree: Mapping[str, PyTree], path: str, name: str) -> Any:
  """Returns the leaf `name` of the module at `path`; raises ValueError where there is none."""
  found: Any = tree
  for part in (*path.split('/'), name):
    found = found.get(part) if isinstance(found, Mapping) else None
  if found is None:
    known = sorted({p.rpartition('/')[0] for p in traverse_util.flatten_dict(dict(tree), sep='/')})
    shown = ', '.join(own for own in known[:8] if own)
    hint = " These are variables: give variables['params']." if 'params' in tree else ''
    raise ValueError(f'There is no {name!r} at {path!r}; modules are {shown}, ...{hint}')
  return found


def at_paths(found: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Returns a tree with these subtrees at module paths; raises ValueError if there is none."""
  if not found:
    raise ValueError('No module is named that could be adapted.')
  return traverse_util.unflatten_dict(dict(found), sep='/')
