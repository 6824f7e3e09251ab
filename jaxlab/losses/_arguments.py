"""What losses and metrics do with their arguments before the formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlab.tracing import is_concrete


def accumulated(*arrays: ArrayLike) -> list[jax.Array]:
  """Returns the arrays in at least float32, in which sums and exponentials are taken."""
  arrays = [jnp.asarray(x) for x in arrays]
  return [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays]


def require_same_shape(ndim: int | None = None, **arrays: ArrayLike) -> None:
  """Raises ValueError unless the named arrays have one shape, of `ndim` axes if that is given."""
  shapes = {name: jnp.shape(x) for name, x in arrays.items()}
  first = next(iter(shapes.values()))
  if any(shape != first for shape in shapes.values()):
    raise ValueError(f'Expected arrays of one shape, got {shapes}.')
  if len(first) != ndim and (ndim is not None or not first):
    expected = f'{ndim} axes' if ndim else 'a feature axis'
    raise ValueError(f'Expected arrays with {expected}, got {shapes}.')


def require_finite(**arrays: ArrayLike) -> None:
  """Raises ValueError if a named array has a row with NaN or infinity (as jax holds it); traced ones pass."""
  for name, values in arrays.items():
    if is_concrete(values):
      values = np.asarray(values)
      with np.errstate(over='ignore'):
        held = values.astype(jnp.result_type(values))
      _raise_at_first(name, values, ~np.isfinite(held), 'not finite')


def require_no_nan(mask: ArrayLike | None = None, **arrays: ArrayLike) -> None:
  """Raises ValueError if a named array holds NaN in a row that `mask` counts; traced ones pass unchecked."""
  for name, values in arrays.items():
    if is_concrete(values) and (mask is None or is_concrete(mask)):
      wrong = np.isnan(np.asarray(values))
      if mask is not None:
        wrong[~np.asarray(mask, bool)] = False
      _raise_at_first(name, values, wrong, 'NaN')


def _raise_at_first(name: str, values: ArrayLike, wrong: np.ndarray, what: str) -> None:
  if wrong.any():
    rows = np.flatnonzero(wrong.reshape(len(wrong), -1).any(1)) if wrong.ndim else np.zeros(1, int)
    raise ValueError(
      f'{name} {jnp.shape(values)}: {len(rows)} rows hold values that are {what}, the first is row {rows[0]}.'
    )


def require_positive(**values: ArrayLike) -> None:
  """Raises ValueError unless the named scalars are positive; traced values pass unchecked."""
  for name, value in values.items():
    if is_concrete(value) and not np.all(np.asarray(value) > 0):
      raise ValueError(f'{name} must be positive, got {value}.')


def require_not_negative(**values: ArrayLike) -> None:
  """Raises ValueError if a named value is below 0 or NaN; traced values pass unchecked."""
  for name, value in values.items():
    if is_concrete(value) and not np.all(np.asarray(value) >= 0):
      raise ValueError(f'{name} must not be negative, got {value}.')


def require_share(**values: ArrayLike) -> None:
  """Raises ValueError unless the named values are in [0, 1]; traced values pass unchecked."""
  for name, value in values.items():
    if is_concrete(value):
      array = np.asarray(value, np.float64)
      if not np.all((array >= 0) & (array <= 1)):
        raise ValueError(f'{name} must be in [0, 1], got {value}.')
