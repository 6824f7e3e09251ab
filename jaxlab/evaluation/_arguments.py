"""Checks that the metrics share; they look at values only where there are concrete ones."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def require_features(name: str, features: ArrayLike, count: int | None = None) -> None:
  """Raises ValueError unless `features` is a matrix (of `count` rows) with rows and columns."""
  shape = jnp.shape(features)
  if len(shape) != 2 or 0 in shape:
    raise ValueError(f'{name} must be [examples, dim] and not empty, got {shape}.')
  if count is not None and shape[0] != count:
    raise ValueError(f'{name} has {shape[0]} rows for {count} labels.')


def require_labels(
  name: str, labels: ArrayLike, num_classes: int, mask: ArrayLike | None = None
) -> None:
  """Raises ValueError unless `labels` are integers; if concrete, unless all (unmasked) are in range."""
  if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
    raise ValueError(f'{name} must be integers, got {jnp.result_type(labels)}.')
  if is_here(labels) and (mask is None or is_here(mask)):
    values = np.asarray(labels)
    values = values if mask is None else values[np.asarray(mask, bool)]
    if values.size and not 0 <= values.min() <= values.max() < num_classes:
      raise ValueError(
        f'{name} must be in [0, {num_classes}), got values from {values.min()} to {values.max()}.'
      )


def is_here(x: ArrayLike) -> bool:
  """Returns whether the values of `x` can be read by this process now."""
  return not isinstance(x, jax.core.Tracer) and getattr(x, 'is_fully_addressable', True)
