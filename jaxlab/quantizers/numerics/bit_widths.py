"""Bit-widths, and the codes that they give."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.tracing import is_concrete

Array = jax.Array
Bits = int | Array

MAX_BITS = 16


def check_bits(bits: Bits, minimum: int = 1) -> None:
  """Raises ValueError unless `bits` is an integer in `[minimum, 16]`; traced bits pass unseen."""
  if not is_concrete(bits):
    return
  value = np.asarray(bits)
  if value.dtype == bool or not np.all(value == np.round(value)):
    raise ValueError(f'bits must be whole numbers; got {bits}.')
  if value.size and (value.min() < minimum or value.max() > MAX_BITS):
    raise ValueError(f'bits must lie in [{minimum}, {MAX_BITS}]; got {bits}.')


def code_range(bits: Bits, signed: bool, narrow: bool = False) -> tuple[Array, Array]:
  """Returns the lowest and highest code as floats.

  Signed `[-2^(b-1), 2^(b-1) - 1]` (narrow: `[-(2^(b-1) - 1), 2^(b-1) - 1]`), unsigned `[0, 2^b - 1]`.
  `bits` may be traced.
  """
  check_bits(bits)
  levels = 2.0 ** jnp.asarray(bits, jnp.float32)
  if not signed:
    return jnp.zeros_like(levels), levels - 1
  return -levels / 2 + (1 if narrow else 0), levels / 2 - 1
