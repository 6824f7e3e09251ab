"""Which labels are clean, from the losses of their examples: a mixture of two Gaussians for each class.

Clean labels are learned first, so that their losses are small while those of wrong ones are still large
(Arazo et al., ICML 2019; Li et al., DivideMix, ICLR 2020). A mixture for each class lets rare ones survive.
`filter_and_correct` is part of a reconstruction of Zhou, Ge & Wu, Friends and Foes in Learning from Noisy
Labels (https://arxiv.org/abs/2103.15055), whose own rules are not public.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_no_nan, require_share
from jaxlab.losses._labels import require_classes, wide


class Filtered(NamedTuple):
  """What becomes of examples with noisy labels, `[examples]` each.

  Attributes:
    keep: bool, whether it is trained on.
    label: int32, the label that it is trained with: the given one or a corrected one.
    corrected: bool, whether the network's prediction takes the place of the given label.
  """

  keep: jax.Array
  label: jax.Array
  corrected: jax.Array


def fit_gmm_1d(
  losses: ArrayLike,
  mask: ArrayLike | None = None,
  *,
  iterations: int = 10,
  tolerance: float = 1e-2,
  variance_floor: float = 5e-4,
) -> jax.Array:
  """Probability of the component with the smaller mean, of two Gaussians fitted to some losses.

  Losses are scaled to [0, 1] by their minimum and maximum. Expectation maximization starts with the means 0
  and 1, equal weights, and the variance of all for both; it ends early where the mean log-likelihood changes
  by less than `tolerance`. Fixed shapes: `jax.vmap` over masks fits many mixtures at once.

  Args:
    losses: `[examples]`.
    mask: bool `[examples]`, which count; None: all.
    iterations: static, at least 1.
    tolerance: see above.
    variance_floor: smallest variance of a component.

  Returns:
    Probabilities `[examples]`, float32 or wider; 1 where fewer than two count or all that do are equal; 0 for
    those that do not count.

  Raises:
    ValueError: for other shapes, (concrete) losses that are NaN, or options out of range.

  Examples:
    >>> fit_gmm_1d(jnp.array([0.1, 0.2, 0.15, 2.0, 2.2])).round().tolist()
    [1.0, 1.0, 1.0, 0.0, 0.0]
  """
  if jnp.ndim(losses) != 1 or (mask is not None and jnp.shape(mask) != jnp.shape(losses)):
    shapes = jnp.shape(losses), None if mask is None else jnp.shape(mask)
    raise ValueError(f'losses and mask must be [examples], got {shapes[0]} and {shapes[1]}.')
  if iterations < 1 or not variance_floor > 0 or not tolerance >= 0:
    raise ValueError(
      f'iterations={iterations}, tolerance={tolerance}, variance_floor={variance_floor}: expected at least '
      '1, at least 0, and a positive number.'
    )
  require_no_nan(mask, losses=losses)
  (losses,) = accumulated(losses)
  mask = jnp.ones(losses.shape, bool) if mask is None else jnp.asarray(mask, bool)
  count = jnp.sum(mask)
  low = jnp.min(jnp.where(mask, losses, jnp.inf))
  high = jnp.max(jnp.where(mask, losses, -jnp.inf))
  plain = (count < 2) | ~(high > low)
  x = jnp.where(mask & ~plain, (losses - low) / jnp.where(plain, 1, high - low), 0)
  total = jnp.maximum(count, 1)
  mean = jnp.sum(x) / total
  spread = jnp.sum(jnp.where(mask, jnp.square(x - mean), 0)) / total
  start = _Mixture(
    jnp.array([0.5, 0.5], x.dtype),
    jnp.array([0.0, 1.0], x.dtype),
    jnp.maximum(jnp.stack([spread, spread]), variance_floor),
  )

  def iterate(carried: tuple[_Mixture, jax.Array, jax.Array], _: None):
    mixture, before, ended = carried
    joint = mixture.log_joint(x)
    evidence = jax.nn.logsumexp(joint, axis=-1)
    now = jnp.sum(jnp.where(mask, evidence, 0)) / total
    shares = jnp.where(mask[:, None], jnp.exp(joint - evidence[:, None]), 0)
    sizes = jnp.sum(shares, 0) + 1e-8
    means = x @ shares / sizes
    variances = jnp.sum(shares * jnp.square(x[:, None] - means), 0) / sizes
    new = _Mixture(sizes / jnp.sum(sizes), means, jnp.maximum(variances, variance_floor))
    mixture = jax.tree.map(lambda old, own: jnp.where(ended, old, own), mixture, new)
    return (mixture, now, ended | (jnp.abs(now - before) < tolerance)), None

  first = (start, jnp.asarray(-jnp.inf, x.dtype), jnp.bool_(False))
  (mixture, _, _), _ = jax.lax.scan(iterate, first, None, length=iterations)
  clean = jnp.argmin(mixture.means)
  posterior = jax.nn.softmax(mixture.log_joint(x), axis=-1)[:, clean]
  return jnp.where(mask, jnp.where(plain, 1, posterior), 0)


class _Mixture(NamedTuple):
  weights: jax.Array
  means: jax.Array
  variances: jax.Array

  def log_joint(self, x: jax.Array) -> jax.Array:
    """Returns `log (weight * density)` of each component, `[examples, 2]`."""
    gap = jnp.square(x[:, None] - self.means) / self.variances
    return jnp.log(self.weights) - 0.5 * (gap + jnp.log(2 * jnp.pi * self.variances))


def clean_by_class(
  losses: ArrayLike,
  labels: ArrayLike,
  num_classes: int,
  *,
  threshold: float = 0.5,
  min_count: int = 10,
) -> jax.Array:
  """Which labels are taken for clean, by a mixture for the losses of each class.

  Args:
    losses: `[examples]`, of the given labels.
    labels: integers `[examples]`, as they are given.
    num_classes: C; static.
    threshold: of the probability of the component with the smaller mean.
    min_count: classes with fewer examples keep the half (rounded up) with the smallest losses.

  Returns:
    bool `[examples]`.

  Raises:
    ValueError: for other shapes, (concrete) labels out of range or losses that are NaN, or a threshold
      outside of [0, 1].

  Examples:
    >>> losses = jnp.concatenate([jnp.full(10, 0.1), jnp.full(5, 3.0), jnp.array([1.0, 2.0])])
    >>> clean_by_class(losses, jnp.array([0] * 15 + [1, 1]), 2).astype(int).tolist()
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0]
  """
  if jnp.ndim(losses) != 1 or jnp.shape(losses) != jnp.shape(labels):
    raise ValueError(
      f'losses and labels must be [examples], got {jnp.shape(losses)} and {jnp.shape(labels)}.'
    )
  require_classes(labels, num_classes)
  require_no_nan(losses=losses)
  require_share(threshold=threshold)
  (losses,), labels = accumulated(losses), wide(labels)

  def of_class(label: jax.Array) -> jax.Array:
    own = labels == label
    count = jnp.sum(own)
    clean = fit_gmm_1d(losses, own) > threshold
    return own & jnp.where(count < min_count, smallest_half(losses, own), clean)

  return jnp.any(jax.lax.map(of_class, jnp.arange(num_classes), batch_size=32), axis=0)


def smallest_half(losses: ArrayLike, mask: ArrayLike) -> jax.Array:
  """Returns which examples that `mask` counts have the smaller losses, half of them (rounded up)."""
  rank = jnp.argsort(jnp.lexsort((jnp.asarray(losses), ~jnp.asarray(mask))))
  return mask & (rank < (jnp.sum(mask) + 1) // 2)


def filter_and_correct(
  losses: ArrayLike,
  given_labels: ArrayLike,
  probs: ArrayLike,
  tau: float,
  num_classes: int,
  *,
  clean: ArrayLike | None = None,
  correct: bool = True,
) -> Filtered:
  """Decides which examples are trained on, and with which label.

  A label is clean by the mixture of its class (`clean_by_class`). Another is replaced by the predicted class
  if the network is sure (`max probs >= tau`); otherwise its example is left out: it may show no class at all.
  A class that would have no example left keeps the half with the smallest losses.

  Args:
    losses: `[examples]`, cross-entropies of the given labels.
    given_labels: integers `[examples]`.
    probs: `[examples, num_classes]`, the network's predictions.
    tau: confidence at which a label is corrected, in [0, 1].
    num_classes: C; static.
    clean: bool `[examples]` in place of the mixtures' decision.
    correct: False: nothing is corrected, what is not clean is left out.

  Returns:
    `Filtered`.

  Raises:
    ValueError: as `clean_by_class`, for a `tau` outside of [0, 1], or other shapes.

  Examples:
    >>> losses = jnp.array([0.1, 0.2, 3.0, 3.0])
    >>> probs = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.05, 0.95], [0.4, 0.6]])
    >>> clean = jnp.array([True, True, False, False])
    >>> found = filter_and_correct(losses, jnp.array([0, 0, 0, 0]), probs, 0.9, 2, clean=clean)
    >>> found.keep.tolist(), found.label.tolist()
    ([True, True, True, False], [0, 0, 1, 0])
  """
  require_share(tau=tau)
  if jnp.shape(probs) != (*jnp.shape(losses), num_classes):
    raise ValueError(
      f'probs must be [examples, {num_classes}] for losses {jnp.shape(losses)}, got {jnp.shape(probs)}.'
    )
  require_no_nan(probs=probs)
  given = wide(given_labels)
  found = clean_by_class(losses, given, num_classes) if clean is None else jnp.asarray(clean, bool)
  sure = jnp.max(jnp.asarray(probs), -1) >= tau
  corrected = ~found & sure & correct
  label = jnp.where(corrected, jnp.argmax(probs, -1), given).astype(jnp.int32)
  keep = found | corrected

  def rescued(which: jax.Array) -> jax.Array:
    own = given == which
    gone = ~jnp.any(keep & (label == which))
    return own & gone & smallest_half(losses, own)

  back = jnp.any(jax.lax.map(rescued, jnp.arange(num_classes), batch_size=32), axis=0)
  return Filtered(keep | back, jnp.where(back, given, label).astype(jnp.int32), corrected & ~back)
