"""What every loss does with its arguments before the formula."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def accumulated(*arrays: ArrayLike) -> list[jax.Array]:
  """Returns the arrays in at least float32, in which sums and exponentials are taken."""
  return [jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.float32)) for x in arrays]


def require_same_shape(ndim: int | None = None, **arrays: ArrayLike) -> None:
  """Raises ValueError unless the named arrays have one shape, of `ndim` axes if that is given."""
  shapes = {name: jnp.shape(x) for name, x in arrays.items()}
  first = next(iter(shapes.values()))
  if any(shape != first for shape in shapes.values()):
    raise ValueError(f'Expected arrays of one shape, got {shapes}.')
  if len(first) != ndim and (ndim is not None or not first):
    expected = f'{ndim} axes' if ndim else 'a feature axis'
    raise ValueError(f'Expected arrays with {expected}, got {shapes}.')


def require_positive(**values: ArrayLike) -> None:
  """Raises ValueError unless the named scalars are positive; traced values pass unchecked."""
  for name, value in values.items():
    if not isinstance(value, jax.core.Tracer) and not value > 0:
      raise ValueError(f'{name} must be positive, got {value}.')
