"""jaxlab: research methods as pure functions for JAX and Flax.

`from jaxlab import losses, quantizers, models, classifiers, evaluation, data, parallel, training`. Rooms load
when they are first used.
"""

import importlib
from typing import Any

__version__ = '0.1.0'

_ROOMS = (
  'classifiers',
  'data',
  'evaluation',
  'losses',
  'models',
  'parallel',
  'quantizers',
  'training',
)


def __getattr__(name: str) -> Any:
  if name in _ROOMS:
    return importlib.import_module(f'jaxlab.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted([*globals(), *_ROOMS])
