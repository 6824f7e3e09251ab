"""When batches are mixed: mixup without hesitation (Yu et al. 2021), for mixup, CutMix and the like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Mix = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def mwh_mix_probability(
  step: ArrayLike,
  total_steps: int,
  p: float = 0.6,
  q: float = 0.9,
  *,
  granularity: Literal['epoch', 'batch'] = 'batch',
  steps_per_epoch: int | None = None,
  reverse: bool = False,
) -> jax.Array:
  """Returns with which probability the batch of a step is mixed: exploration first, exploitation last.

    1                      for t < round(p T)
    1, 0, 1, 0, ...        for round(p T) <= t < round(q T): mixed where t is even
    (T - t) / (T (1 - q))  from then on, at most 1

  where t is the step and T all steps, or the epoch and all epochs. The paper counts batches, its code epochs:
  trainings of fewer than some 20 epochs need batches.

  Args:
    step: finished steps, an integer; may be traced.
    total_steps: of the training; static.
    p: share of the training in which all batches are mixed.
    q: share from which on it fades; 1: it never does.
    granularity: what is counted.
    steps_per_epoch: for 'epoch': a divisor of `total_steps`.
    reverse: the same backwards in time, plain batches first: a control, of ours.

  Returns:
    A float32 scalar (or of the shape of `step`) in [0, 1].

  Raises:
    ValueError: unless 0 <= p <= q <= 1; for another granularity, steps that are not positive, or an epoch
      that does not divide them.

  References:
    Yu, Wang & Wu, Mixup Without Hesitation, ICIG 2021 (https://arxiv.org/abs/2101.04342), algorithm 1.

  Examples:
    >>> [round(float(mwh_mix_probability(step, 20)), 2) for step in (0, 11, 12, 13, 17, 18, 19)]
    [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.5]
  """
  if not 0 <= p <= q <= 1:
    raise ValueError(f'Expected 0 <= p <= q <= 1, got p={p} and q={q}.')
  if granularity not in ('epoch', 'batch'):
    raise ValueError(f"granularity is {granularity!r}, expected 'epoch' or 'batch'.")
  if total_steps < 1:
    raise ValueError(f'total_steps is {total_steps}, expected at least 1.')
  time, total = jnp.asarray(step), total_steps
  if granularity == 'epoch':
    if steps_per_epoch is None or steps_per_epoch < 1 or total_steps % steps_per_epoch:
      raise ValueError(
        f'steps_per_epoch is {steps_per_epoch}, expected a divisor of total_steps={total_steps}.'
      )
    time, total = time // steps_per_epoch, total_steps // steps_per_epoch
  time = total - 1 - time if reverse else time
  fading = jnp.asarray(total - time, jnp.float32) / (total * (1 - q) if q < 1 else 1)
  alternating = jnp.where(time % 2 == 0, 1.0, 0.0)
  later = jnp.where(time < round(q * total), alternating, jnp.clip(fading, 0, 1))
  return jnp.where(time < round(p * total), 1.0, later).astype(jnp.float32)


def mix_with_probability(
  key: jax.Array, images: ArrayLike, probability: ArrayLike, mix: Mix
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Mixes a whole batch, or leaves it as it is: one draw a batch, one program for both.

  Args:
    key: of the draws.
    images: floats `[batch, ...]`.
    probability: of mixing, a scalar in [0, 1]; may be traced.
    mix: `(key, images) -> (mixed, partners, share)`, such as `functools.partial(mixup, alpha=0.5)`.

  Returns:
    Images, partners and the share of a record's own label, as of `mix`; a batch that is left has the share 1,
    so that `mixup_loss` is its plain loss.

  Raises:
    ValueError: for images without a batch axis or without a record.

  Examples:
    >>> from jaxlab.data import mixup
    >>> mix = lambda key, x: mixup(key, x, 0.5)
    >>> images = jnp.arange(4.0)[:, None]
    >>> same, _, share = mix_with_probability(jax.random.key(0), images, 0.0, mix)
    >>> bool((same == images).all()), float(share)
    (True, 1.0)
  """
  images = jnp.asarray(images)
  if not images.ndim or not len(images):
    raise ValueError(f'images must be [batch, ...], not empty; got {images.shape}.')
  draw_key, mix_key = jax.random.split(key)
  chosen = jax.random.uniform(draw_key) < probability
  mixed, partners, share = mix(mix_key, images)
  return jnp.where(chosen, mixed, images), partners, jnp.where(chosen, share, 1)
