"""Colinearity Decay: weight decay in the directions that the next matrix amplifies, for optax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.losses.colinearity import KINDS, Kind, colinearity_loss
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any
Pair = Callable[[PyTree], tuple[Array, Array]]

DEFAULT = 0.1  # of kind 'product', of the order of a weight decay


class ColinearityDecayState(NamedTuple):
  """State of `colinearity_decay`.

  Attributes:
    count: int32, the number of updates.
    skipped: int32, how many pairs were left out of the last update, because their gradient was not finite.
  """

  count: Array
  skipped: Array


def colinearity_decay(
  pairs: Sequence[Pair],
  lam: float | Array | None = None,
  kind: Kind = 'product',
  *,
  power: float = 4,
  ratio: float = 2,
  every: int = 1,
  learning_rate: float | optax.Schedule | None = None,
) -> optax.GradientTransformation:
  """Adds `lam dR/dW` of all pairs of matrices to the updates, *before* the learning rate multiplies them.

    optax.chain(optax.scale_by_adam(), colinearity_decay(pairs), optax.scale_by_learning_rate(schedule))

  so that each step subtracts `learning_rate lam dR/dW`: decoupled, as AdamW's weight decay, from moments,
  clipping and the loss. (Behind the scaling it would ascend, at a rate of its own.) All gradients are
  those of the weights before the step, in float32; of a matrix in several pairs they add up.
  `make_optimizer` takes it as `decoupled`. The coefficient and the formulas are this library's, not the
  authors'.

  Args:
    pairs: functions `params -> (first [..., in, hidden], second [..., hidden, out])`, such as
      `models.weight_pairs(model)`; slices of fused or stacked kernels get their gradients back in place.
    lam: not negative; None: 0.1 for `'product'`, whose useful range is 0.03 to 0.3; the other kinds have no
      default. At 0, also if that is traced, the updates pass as they are, bit for bit.
    kind: see `losses.colinearity_loss`, as `power` and `ratio`.
    power: of `'row_power'`.
    ratio: of `'excess'`.
    every: apply in every n-th update alone, with n times the weight; the first is one.
    learning_rate: what multiplies the updates afterwards, a number or its schedule, for a guard of
      `'product'`: an explicit step is stable while `learning_rate lam c < 1`, c the larger of the largest
      curvatures of both kernels: of the first one the squared largest singular value of the second, times
      the largest squared scale of a folded norm. Beyond, the step of that pair is scaled by half over the
      product. Each curvature is estimated from below, along the kernel's own gradient, which is a step of
      power iteration. None: no guard.

  Returns:
    A transformation that needs the parameters; its state counts pairs that were left out because their
    gradients are not finite.

  Raises:
    ValueError: for no pairs, an unknown kind, a missing or negative `lam`, options out of range; and from
      `init` and `update` for pairs that the parameters do not hold, or that do not chain.

  References:
    Tong et al., Colinearity Decay: Training Quantization-Friendly ViTs with Outlier Decay
    (https://arxiv.org/abs/2605.01330).
  """
  pairs = tuple(pairs)
  if not pairs:
    raise ValueError('pairs is empty: there is nothing to decay.')
  if kind not in KINDS:
    raise ValueError(f'kind={kind!r}; choose {", ".join(map(repr, KINDS))}.')
  if lam is None and kind != 'product':
    raise ValueError(f'lam has a default for kind product alone; give it for {kind!r}.')
  weight = DEFAULT if lam is None else lam
  if is_concrete(weight) and not np.all(np.asarray(weight) >= 0):
    raise ValueError(f'lam must not be negative, got {lam}.')
  if not (isinstance(every, int) and every >= 1):
    raise ValueError(f'every must be a positive whole number, got {every}.')
  if learning_rate is not None and kind != 'product':
    raise ValueError(f'The guard by learning_rate is for kind product, not for {kind!r}.')
  off = is_concrete(weight) and not np.any(np.asarray(weight))

  def loss(first: Array, second: Array) -> Array:
    return jnp.sum(colinearity_loss(first, second, kind, power=power, ratio=ratio))

  jax.eval_shape(loss, *[jax.ShapeDtypeStruct((1, 1), jnp.float32)] * 2)  # options out of range

  def read(params: PyTree) -> list[tuple[Array, Array]]:
    return [pair(params) for pair in pairs]

  def gradients(params: PyTree, count: Array) -> tuple[PyTree, Array]:
    matrices, pull_back = jax.vjp(read, params)
    strength = jnp.asarray(weight, jnp.float32) * every
    wide = [tuple(map(_wide, kernels)) for kernels in matrices]
    slopes = [jax.grad(loss, (0, 1))(*kernels) for kernels in wide]
    factors = [strength] * len(slopes)
    if learning_rate is not None:
      rate = learning_rate(count) if callable(learning_rate) else learning_rate
      # The gradients as the pairs see them behind a step on the kernels themselves: a norm that is folded
      # into a matrix has multiplied them twice.
      pulled = pull_back(_like(slopes, matrices))[0]
      moved = jax.jvp(read, (params,), (pulled,))[1]
      factors = [
        strength * _guard(kernels, own, tuple(map(_wide, seen)), rate * strength)
        for kernels, own, seen in zip(wide, slopes, moved)
      ]
    found, skipped = [], jnp.int32(0)
    for factor, own in zip(factors, slopes):
      # Blocks and heads that are stacked are pairs of their own.
      both = [jnp.all(jnp.isfinite(slope), (-2, -1), keepdims=True) for slope in own]
      finite = both[0] & both[1]
      skipped += jnp.sum(~finite, dtype=jnp.int32)
      found.append(tuple(jnp.where(finite, factor * slope, 0) for slope in own))
    return pull_back(_like(found, matrices))[0], skipped

  def init(params: PyTree) -> ColinearityDecayState:
    jax.eval_shape(lambda params: [loss(*kernels) for kernels in read(params)], params)
    return ColinearityDecayState(jnp.int32(0), jnp.int32(0))

  def update(
    updates: PyTree, state: ColinearityDecayState, params: PyTree | None = None
  ) -> tuple[PyTree, ColinearityDecayState]:
    count = optax.safe_increment(state.count)
    if off:
      return updates, ColinearityDecayState(count, state.skipped)
    if params is None:
      raise ValueError(
        'colinearity_decay needs the parameters: optimizer.update(grads, state, params).'
      )

    def add() -> tuple[PyTree, Array]:
      slopes, skipped = gradients(params, state.count)
      # What gets nothing passes as it is: -0 plus 0 would be 0.
      own = lambda u, s: jnp.where(s == 0, u, u + s.astype(u.dtype))  # noqa: E731
      return jax.tree.map(own, updates, slopes), skipped

    if every == 1:
      updates, skipped = add()
    else:
      due = state.count % every == 0
      updates, skipped = jax.lax.cond(due, add, lambda: (updates, jnp.int32(0)))
    return updates, ColinearityDecayState(count, skipped)

  return optax.GradientTransformation(init, update)


def colinearity_penalty(
  params: PyTree,
  pairs: Sequence[Pair],
  kind: Kind = 'product',
  *,
  power: float = 4,
  ratio: float = 2,
) -> Array:
  """Returns the regularizer of all pairs, a scalar: `sum R(first, second)` over pairs, heads and blocks.

  For those who would rather add it to a loss, where the optimizer's preconditioner scales its gradient, or
  report it. Arguments and errors as those of `colinearity_decay`.
  """
  terms = [colinearity_loss(*pair(params), kind, power=power, ratio=ratio) for pair in pairs]
  if not terms:
    raise ValueError('pairs is empty: there is nothing to penalize.')
  return sum(jnp.sum(term) for term in terms)


def _wide(kernel: Array) -> Array:
  return kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))


def _like(slopes: Sequence[tuple[Array, Array]], kernels: Sequence[tuple[Array, Array]]) -> list:
  """Returns gradients in the dtypes of the kernels."""
  return jax.tree.map(lambda slope, kernel: slope.astype(kernel.dtype), slopes, list(kernels))


def _guard(
  kernels: tuple[Array, Array],
  slopes: tuple[Array, Array],
  moved: tuple[Array, Array],
  rate: Array,
) -> Array:
  """Returns the factor `[..., 1, 1]` on the step of each pair.

  Args:
    kernels: as the pair has them, `[..., in, hidden]` and `[..., hidden, out]`.
    slopes: gradients at these.
    moved: by what they change if the parameters move by their gradients.
    rate: learning rate times lam.
  """

  def total(x: Array) -> Array:
    return jnp.sum(x, (-2, -1), keepdims=True)

  def multiply(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

  changes = multiply(moved[0], kernels[1]), multiply(kernels[0], moved[1])
  curvatures = []
  for change, slope, own in zip(changes, slopes, moved):
    # Relative to the largest, so that squares of small gradients do not vanish.
    largest = jnp.max(jnp.abs(slope), (-2, -1), keepdims=True)
    unit = 1 / jnp.where(largest > 0, largest, 1)
    size = total(slope * unit * own * unit)
    found = total(jnp.square(change * unit)) / jnp.where(size > 0, size, 1)
    curvatures.append(jnp.where(size > 0, found, 0))
  unstable = rate * jnp.maximum(*curvatures)
  return jnp.where(unstable >= 1, 0.5 / jnp.where(unstable >= 1, unstable, 1), 1)
