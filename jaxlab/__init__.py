"""jaxlab: research methods as pure functions for JAX and Flax.

`from jaxlab import losses, quantizers, models, adapters, classifiers, compression, evaluation,
localization, data, parallel, training`. Rooms load when they are first used.

**Values that are not finite** are never turned into a plausible number. One rule for all rooms:

- NaN in, NaN out, for all that is a float: losses, gradients, metrics, accumulated metrics.
- Where a decision would hide it (a class, a rank, a neighbor, a fitted probe), NaN or infinite values raise
  ValueError where they are concrete. Under `jit`, where they cannot, a class is -1 and a metric NaN.
- -inf is a masked class in logits, and nowhere else a legal value.
- Training stops with FloatingPointError at a loss, a parameter or a statistic of the model (running means,
  ranges) that is not finite: such a state is neither saved nor returned. A score that is not finite never
  makes a checkpoint the best.
"""

import importlib
from typing import Any

__version__ = '0.1.0'

_ROOMS = (
  'adapters',
  'classifiers',
  'compression',
  'data',
  'evaluation',
  'localization',
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
