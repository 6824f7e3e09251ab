"""The largest value at which a falling accuracy is above a threshold: on the host, and compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

PyTree = Any


def bisect_epsilon(
  evaluate: Callable[[float], float],
  threshold: float,
  *,
  right: float = 10.0,
  tolerance: float = 0.05,
) -> tuple[float, list[tuple[float, float, float, float]]]:
  """Bisects [0, right] for the epsilon at which an accuracy falls to `threshold`.

  From epsilon = right / 2: if `evaluate(epsilon) > threshold` the interval's left end moves there, else
  its right end, and epsilon becomes its midpoint, until the interval is shorter than `tolerance` (8 times
  with the defaults; never, if it is from the start). `bisect_epsilon_compiled` takes the same steps inside
  of a compiled program.

  Args:
    evaluate: accuracy at an epsilon, in [0, 1].
    threshold: in [0, 1].
    right: largest epsilon considered; a warning says if the result is there.
    tolerance: length of the interval below which the search ends.

  Returns:
    `(epsilon, trace)`: the last midpoint, and (epsilon, accuracy, left, right) of each iteration, the ends
    as they were before it.

  Raises:
    ValueError: if `right` or `tolerance` is not positive.

  >>> bisect_epsilon(lambda epsilon: 1 - epsilon / 10, 0.5, tolerance=2.0)[0]
  4.375
  """
  num_iterations(right, tolerance)
  left, end, trace = 0.0, right, []
  while end - left >= tolerance:
    epsilon = (left + end) / 2
    accuracy = float(evaluate(epsilon))
    trace.append((epsilon, accuracy, left, end))
    left, end = (epsilon, end) if accuracy > threshold else (left, epsilon)
  if trace and end == right:
    warnings.warn(
      f'epsilon={(left + end) / 2:g} is at the end of the range: right={right:g} is too small.',
      stacklevel=2,
    )
  return (left + end) / 2, trace


def bisect_epsilon_compiled(
  evaluate: Callable[[PyTree, jax.Array, jax.Array], tuple[PyTree, jax.Array]],
  state: PyTree,
  threshold: ArrayLike,
  *,
  right: float = 10.0,
  tolerance: float = 0.05,
) -> tuple[PyTree, jax.Array, jax.Array, jax.Array]:
  """The bisection of `bisect_epsilon` as a scan: traceable, and with a state that is warm-started.

  The interval halves every time, so the number of iterations is known beforehand; `vmap` runs any number
  of searches in step. `bisect_epsilon` is the reference: where `tolerance` is `right` halved some times, the
  rounding of its ends may cost it, or spare it, the last iteration.

  Args:
    evaluate: `(state, epsilon, iteration) -> (state, accuracy)`, pure.
    state: what goes from iteration to iteration, e.g. the head.
    threshold: scalar; its dtype, at least float32, is that of the search.
    right: static, as in `bisect_epsilon`.
    tolerance: static, as in `bisect_epsilon`.

  Returns:
    `(state, epsilon, interval, trace)`: the last midpoint, the last interval `[2]`, and epsilon, accuracy,
    left and right of each iteration, `[iterations, 4]`.

  Raises:
    ValueError: if `right` or `tolerance` is not positive.
  """
  dtype = jnp.promote_types(jnp.result_type(threshold), jnp.float32)

  def halve(carry, iteration):
    state, left, end = carry
    epsilon = (left + end) / 2
    state, accuracy = evaluate(state, epsilon, iteration)
    accuracy = accuracy.astype(dtype)
    fits = accuracy > threshold
    new = state, jnp.where(fits, epsilon, left), jnp.where(fits, end, epsilon)
    return new, jnp.stack([epsilon, accuracy, left, end])

  ends = jnp.zeros((), dtype), jnp.asarray(right, dtype)
  iterations = jnp.arange(num_iterations(right, tolerance))
  (state, left, end), trace = jax.lax.scan(halve, (state, *ends), iterations)
  return state, (left + end) / 2, jnp.stack([left, end]), trace


def num_iterations(right: float, tolerance: float) -> int:
  """Returns how often an interval [0, right] is halved until it is shorter than `tolerance`."""
  for name, value in (('right', right), ('tolerance', tolerance)):
    if not value > 0:
      raise ValueError(f'{name}={value} must be positive.')
  count, width = 0, right
  while width >= tolerance:
    count, width = count + 1, width / 2
  return count
