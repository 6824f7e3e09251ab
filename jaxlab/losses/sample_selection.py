"""Two networks that choose for each other which examples with noisy labels to learn from.

Peer-learning: Sun et al., Webly Supervised Fine-Grained Recognition: Benchmark Datasets and An Approach, ICCV
2021 (https://arxiv.org/abs/2108.02399). Decoupling: Malach & Shalev-Shwartz, Decoupling "When to Update" from
"How to Update", NeurIPS 2017. Co-teaching: Han et al., Co-teaching: Robust Training of Deep Neural Networks
with Extremely Noisy Labels, NeurIPS 2018.

All take the logits of both networks for one batch and return a loss for each. A loss is a function of its own
network's logits alone, for no gradient flows through a choice: the gradient of the sum of both is what each
network needs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_same_shape
from jaxlab.losses._labels import one_or_nan, require_labels
from jaxlab.losses.classification import cross_entropy
from jaxlab.tracing import is_concrete


class Selection(NamedTuple):
  """Which examples were chosen, bool `[batch]` each.

  Attributes:
    agree: both networks predict the same class, right or wrong.
    keep1: the small-loss examples by the first network's losses.
    keep2: likewise by the second network's.
    update1: those that the first network's loss is a mean over.
    update2: likewise of the second.
  """

  agree: jax.Array
  keep1: jax.Array
  keep2: jax.Array
  update1: jax.Array
  update2: jax.Array


class PairLoss(NamedTuple):
  """A loss for each of two networks.

  Attributes:
    loss1: scalar, of the first network's logits.
    loss2: likewise of the second's.
    aux: which examples they are means over.
  """

  loss1: jax.Array
  loss2: jax.Array
  aux: Selection


def peer_learning_loss(
  logits1: ArrayLike,
  logits2: ArrayLike,
  labels: ArrayLike,
  drop_rate: ArrayLike,
  mode: Literal['peer', 'agreement', 'disagreement'] = 'peer',
) -> PairLoss:
  """Peer-learning: all examples that networks disagree on, and their peer's small-loss ones of the others.

  With `G_d` the examples for which the predicted classes differ, `G_s` the others, and `G_si` the
  `R = floor((1 - drop_rate) |G_s|)` of `G_s` with the smallest cross-entropy under network i:

    loss1 = mean of CE(logits1, label) over G_d and G_s2
    loss2 = mean of CE(logits2, label) over G_d and G_s1

  A loss over no examples is 0 (the official code's is NaN). Of equal logits the lower class is predicted, of
  equal losses the earlier example comes first.

  Args:
    logits1: `[batch, num_classes]`, of the first network.
    logits2: likewise of the second.
    labels: integers `[batch]`, as they are given.
    drop_rate: share of the agreement that is left out, in [0, 1); may be traced.
    mode: 'peer'; 'agreement': without `G_d`; 'disagreement': without `G_s1` and `G_s2`.

  Returns:
    Both losses, float32 or wider, and what they are means over. NaN for a traced label out of range.

  Raises:
    ValueError: if shapes or labels do not fit, for a (concrete) `drop_rate` out of range, or another mode.

  References:
    Peer-learning, section 4 and the official code.

  Examples:
    >>> logits1, logits2 = (
    ...   jnp.array([[4.0, 0], [3, 0], [2, 0]]),
    ...   jnp.array([[1.0, 0], [0, 2], [3, 0]]),
    ... )
    >>> loss1, loss2, chosen = peer_learning_loss(logits1, logits2, jnp.array([0, 1, 0]), 0.5)
    >>> chosen.agree.tolist(), chosen.update1.tolist(), chosen.update2.tolist()
    ([True, False, True], [False, True, True], [True, True, False])
    >>> round(float(loss1), 4), round(float(loss2), 4)
    (1.5878, 0.2201)
  """
  if mode not in ('peer', 'agreement', 'disagreement'):
    raise ValueError(f"mode is {mode!r}, expected 'peer', 'agreement' or 'disagreement'.")
  losses, agree = _losses(logits1, logits2, labels, drop_rate)
  kept = [_smallest(own, agree, drop_rate) for own in losses]
  if mode == 'disagreement':
    kept = [jnp.zeros_like(agree)] * 2
  others = jnp.zeros_like(agree) if mode == 'agreement' else ~agree
  return _pair_loss(
    losses, labels, jnp.shape(logits1)[-1], agree, kept, others | kept[1], others | kept[0]
  )


def co_teaching_loss(
  logits1: ArrayLike,
  logits2: ArrayLike,
  labels: ArrayLike,
  drop_rate: ArrayLike,
  *,
  exchange: bool = True,
) -> PairLoss:
  """Co-teaching: each network learns from the examples with the smallest losses under the other.

    loss1 = mean of CE(logits1, label) over the floor((1 - drop_rate) batch) smallest CE(logits2, label)

  and likewise the other way round.

  Args:
    logits1: `[batch, num_classes]`, of the first network.
    logits2: likewise of the second.
    labels: integers `[batch]`, as they are given.
    drop_rate: share of the batch that is left out, in [0, 1); may be traced.
    exchange: False: each network learns from its own small-loss examples.

  Returns:
    Both losses, see `peer_learning_loss`.

  Raises:
    ValueError: as `peer_learning_loss`.

  Examples:
    >>> logits1, logits2 = jnp.array([[4.0, 0], [3, 0]]), jnp.array([[1.0, 0], [0, 2]])
    >>> co_teaching_loss(logits1, logits2, jnp.array([0, 1]), 0.5).aux.update1.tolist()
    [False, True]
  """
  losses, agree = _losses(logits1, logits2, labels, drop_rate)
  kept = [_smallest(own, jnp.ones_like(agree), drop_rate) for own in losses]
  chosen = kept[::-1] if exchange else kept
  return _pair_loss(losses, labels, jnp.shape(logits1)[-1], agree, kept, *chosen)


def decoupling_loss(
  logits1: ArrayLike, logits2: ArrayLike, labels: ArrayLike, drop_rate: ArrayLike = 0.0
) -> PairLoss:
  """Decoupling: both networks learn from the examples for which their predictions differ.

  Args:
    logits1: `[batch, num_classes]`, of the first network.
    logits2: likewise of the second.
    labels: integers `[batch]`, as they are given.
    drop_rate: nothing is dropped by losses: only checked, so that all losses of this kind are called alike.

  Returns:
    Both losses, see `peer_learning_loss`; 0 where the networks agree on all examples.

  Raises:
    ValueError: as `peer_learning_loss`.

  Examples:
    >>> logits1, logits2 = jnp.array([[4.0, 0], [3, 0]]), jnp.array([[1.0, 0], [0, 2]])
    >>> decoupling_loss(logits1, logits2, jnp.array([0, 1])).aux.update1.tolist()
    [False, True]
  """
  return peer_learning_loss(logits1, logits2, labels, drop_rate, 'disagreement')


def _losses(
  logits1: ArrayLike, logits2: ArrayLike, labels: ArrayLike, drop_rate: ArrayLike
) -> tuple[list[jax.Array], jax.Array]:
  """Returns the cross-entropies of both networks, and for which examples their predictions are equal."""
  require_same_shape(2, logits1=logits1, logits2=logits2)
  require_labels(logits1, labels)
  if jnp.ndim(drop_rate):
    raise ValueError(f'drop_rate must be a scalar, got the shape {jnp.shape(drop_rate)}.')
  if is_concrete(drop_rate) and not 0 <= float(np.asarray(drop_rate)) < 1:
    raise ValueError(f'drop_rate must be in [0, 1), got {drop_rate}.')
  each = accumulated(logits1, logits2)
  agree = jnp.argmax(each[0], -1) == jnp.argmax(each[1], -1)
  return [cross_entropy(logits, labels) for logits in each], agree


def _smallest(losses: jax.Array, among: jax.Array, drop_rate: ArrayLike) -> jax.Array:
  """Returns the share `1 - drop_rate` of the examples `among` with the smallest losses, bool `[batch]`."""
  # Examples outside come last, also behind infinite losses.
  order = jnp.lexsort((jax.lax.stop_gradient(losses), ~among))
  rank = jnp.argsort(order)
  return among & (rank < _kept_count(jnp.sum(among), drop_rate))


def _kept_count(count: jax.Array, drop_rate: ArrayLike) -> jax.Array:
  """Returns `floor((1 - drop_rate) count)`, exact where the product is an integer: 13 of 20 at 0.35.

  Rounding may leave the product just below the integer, by more the larger it is: so much is added first.
  """
  product = (1 - jnp.asarray(drop_rate, jnp.float32)) * count.astype(jnp.float32)
  slack = 1e-6 + 2 * jnp.finfo(jnp.float32).eps * product
  return jnp.floor(product + slack).astype(jnp.int32)


def _pair_loss(
  losses: list[jax.Array],
  labels: ArrayLike,
  num_classes: int,
  agree: jax.Array,
  kept: list[jax.Array],
  update1: jax.Array,
  update2: jax.Array,
) -> PairLoss:
  """Returns the means of both networks' losses over what each is to learn from."""
  # A label out of range makes its loss NaN; left out it would go unnoticed.
  valid = jnp.prod(one_or_nan(labels, num_classes, losses[0].dtype))
  means = [
    valid * jnp.sum(jnp.where(chosen, own, 0)) / jnp.maximum(jnp.sum(chosen), 1)
    for own, chosen in zip(losses, (update1, update2), strict=True)
  ]
  return PairLoss(*means, Selection(agree, *kept, update1, update2))
