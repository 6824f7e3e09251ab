"""Penalties on large activations, so that a network can be trained and run in few bits."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_not_negative, require_positive


def tweo_loss(
  block_outputs: Sequence[ArrayLike] | ArrayLike,
  *,
  tau: ArrayLike = 3.0,
  power: float = 4,
  epsilon: float = 1e-6,
  mask: ArrayLike | None = None,
) -> jax.Array:
  """Scaled L_p penalty on the outputs of a transformer's blocks.

    loss = 1/L sum_l mean((|A_l| / (tau + epsilon))^power)

  A soft threshold: an element of tau / 2 costs 1/16, one of tau 1, one of 10 tau 10^4. It is added to the
  task's loss with a weight of 0.01, constant, or falling as `schedules.cosine(0.01, total_steps)`. There is
  no stop-gradient; the gradient of an element that is 0 is 0.

  Args:
    block_outputs: of each of the L blocks the residual stream behind its MLP, of any shape (those of Swin
      differ), or all of them in one array `[L, ...]`; see `models.block_outputs`. Half precisions are
      raised to float32.
    tau: positive; 2 to 5 work equally.
    power: at least 1, a Python number.
    epsilon: not negative.
    mask: `[batch, time]`, false or 0 for padding, which the means leave out; None: all is real. Then outputs
      are `[batch, time, ...]`.

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: for no blocks, outputs that are no floats, a mask that does not fit them, or values that are
      (where concrete) out of range.

  References:
    Liang et al., TWEO: Transformers Without Extreme Outliers Enables FP8 Training and Quantization for
    Dummies, CVPR 2026 (https://arxiv.org/abs/2511.23225).

  Examples:
    >>> round(float(tweo_loss([jnp.array([[3.0, 0.0]])])), 4)
    0.5
  """
  require_positive(tau=tau)
  require_not_negative(epsilon=epsilon)
  if not power >= 1:
    raise ValueError(f'power must be at least 1, got {power}.')
  # One array [L, ...] is indexed by its blocks, but reduced as a whole.
  whole = hasattr(block_outputs, 'ndim')
  outputs = [jnp.asarray(y) for y in ([block_outputs] if whole else block_outputs)]
  if not outputs or (whole and (outputs[0].ndim < 2 or not outputs[0].shape[0])):
    raise ValueError(
      'block_outputs holds no block: expected a sequence of arrays, or one array [blocks, ...].'
    )
  if wrong := [y.dtype.name for y in outputs if not jnp.issubdtype(y.dtype, jnp.floating)]:
    raise ValueError(f'block_outputs must be floats, got {wrong[0]}.')

  def powers(y: jax.Array) -> jax.Array:
    scaled = y / (tau + epsilon)
    if power == 4:
      return jnp.square(jnp.square(scaled))
    return jnp.where(scaled == 0, 0, jnp.abs(scaled)) ** power  # the slope of |x| at 0 is 1 in jax

  def cost(y: jax.Array) -> jax.Array:
    if mask is None:
      return jnp.mean(powers(y))
    first = int(whole)
    shape = jnp.shape(mask)
    if y.shape[first : first + 2] != shape or len(shape) != 2:
      raise ValueError(
        f'mask must be [batch, time] of the block outputs, got {shape} for outputs {y.shape[first:]}.'
      )
    valid = jnp.asarray(mask, bool)
    # Taken out before the power: what padding holds may not be finite, nor its slope.
    kept = jnp.where(jnp.expand_dims(valid, range(2, y.ndim - first)), y, 0)
    by_token = jnp.mean(powers(kept), range(first + 2, y.ndim))
    count = jnp.maximum(jnp.sum(valid), 1) * (y.shape[0] if whole else 1)
    return jnp.sum(by_token) / count

  return sum(map(cost, accumulated(*outputs))) / len(outputs)
