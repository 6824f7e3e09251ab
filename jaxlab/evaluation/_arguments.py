"""Checks that metrics of features share."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import require_finite


def require_features(name: str, features: ArrayLike, count: int | None = None) -> None:
  """Raises ValueError unless `features` is a matrix (of `count` rows), not empty; finite if concrete."""
  shape = jnp.shape(features)
  if len(shape) != 2 or 0 in shape:
    raise ValueError(f'{name} must be [examples, dim] and not empty, got {shape}.')
  if count is not None and shape[0] != count:
    raise ValueError(f'{name} has {shape[0]} rows for {count} labels.')
  require_finite(**{name: features})
