"""Whether a value can be looked at while a function is traced."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike


def is_concrete(x: ArrayLike) -> bool:
  """Returns whether this process can read the values of `x` now, by `np.asarray`.

  In a `jit` that closes over `x` its values can be read, but jax would trace what it computes of them.
  """
  return not isinstance(x, jax.core.Tracer) and getattr(x, 'is_fully_addressable', True)
