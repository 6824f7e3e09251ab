"""Discrimination of every training image from all others, by a memory bank with one vector for each.

Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018
(https://arxiv.org/abs/1805.01978); Cao & Wu, On Improving the Algorithm-, Model-, and Data-Efficiency of
Self-Supervised Learning, 2024 (https://arxiv.org/abs/2404.19289), here "the paper". Its first bank holds the
normalized features that the untrained network gives of all training images, augmented.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlab.losses._arguments import (
  accumulated,
  require_not_negative,
  require_positive,
  require_share,
)
from jaxlab.losses.contrastive import normalize
from jaxlab.tracing import is_concrete


def sqrt_kl(
  logits: ArrayLike,
  power: float = 0.5,
  *,
  direction: Literal['p_u', 'u_p'] = 'p_u',
  stop_gradient: bool = True,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Divergence of a distribution and its own smoothed version (SqrtKL), a mean over rows.

    p = softmax(logits);  u = p^power / sum(p^power)
    'p_u': sum(p (log p - log u));  'u_p': sum(u (log u - log p))

  With the gradient stopped at `u`, that of 'p_u' is `1 - power` times the negative entropy's.

  Args:
    logits: `[..., classes]`; in the paper cosines, not divided by a temperature.
    power: positive; 1 makes the loss 0.
    direction: which of the two comes first; the paper's code uses 'p_u'.
    stop_gradient: whether `u` is a constant.
    where: bool, broadcastable to the logits: the classes that are there.

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: for another direction, or if `power` is not positive.

  References:
    The paper, section on self-distillation.

  Examples:
    >>> round(float(sqrt_kl(jnp.array([[2.0, 0.0]]))), 4)
    0.0671
  """
  require_positive(power=power)
  if direction not in ('p_u', 'u_p'):
    raise ValueError(f"direction is {direction!r}, expected 'p_u' or 'u_p'.")
  (logits,) = accumulated(logits)
  where = jnp.ones((), bool) if where is None else jnp.asarray(where)
  log_p = jax.nn.log_softmax(jnp.where(where, logits, -jnp.inf), axis=-1)
  log_p = jnp.where(where, log_p, 0)  # -inf has no gradient; what is not there is left out below
  log_u = jax.nn.log_softmax(jnp.where(where, power * log_p, -jnp.inf), axis=-1)
  log_u = jnp.where(where, log_u, 0)
  if stop_gradient:
    log_u = jax.lax.stop_gradient(log_u)
  first, second = (log_p, log_u) if direction == 'p_u' else (log_u, log_p)
  terms = jnp.where(where, jnp.exp(first) * (first - second), 0)
  return jnp.mean(jnp.sum(terms, axis=-1))


class BankLoss(NamedTuple):
  """What `memory_bank_loss` returns.

  Attributes:
    loss: `cross_entropy + kl_weight * kl`.
    cross_entropy: of each feature's own row.
    kl: `sqrt_kl` of the cosines.
    cosines: `[batch, columns]`, of the features and the chosen rows.
  """

  loss: jax.Array
  cross_entropy: jax.Array
  kl: jax.Array
  cosines: jax.Array


def memory_bank_loss(
  features: ArrayLike,
  bank: ArrayLike,
  columns: ArrayLike,
  temperature: ArrayLike = 0.2,
  *,
  kl_weight: ArrayLike = 20.0,
  power: float = 0.5,
  where: ArrayLike | None = None,
  partners: ArrayLike | None = None,
  share: ArrayLike = 1.0,
) -> BankLoss:
  """Cross-entropy of each image among rows of the bank, and the divergence of `sqrt_kl`.

    s = normalize(features) @ bank[columns].T
    loss = mean(cross_entropy(s / temperature, own column)) + kl_weight * sqrt_kl(s, power)

  No gradient flows into the bank; take the loss before the bank is updated.

  Args:
    features: of one view an image, not normalized, `[batch, dim]`.
    bank: unit rows, `[images, dim]`.
    columns: int `[count]`, rows that are compared; the first `batch` are the images' own.
    temperature: positive scalar.
    kl_weight: not negative.
    power: see `sqrt_kl`.
    where: bool `[count]`: False for drawn negatives that are images of the batch (see `sample_columns`).
    partners: int `[batch]`: positions in the batch of the images that were mixed in (CutMix).
    share: of the first image of a mixture, in [0, 1].

  Returns:
    The loss with its parts.

  Raises:
    ValueError: if shapes do not fit, a hyper-parameter is out of its range, or (concrete) `columns` or
      `partners` are outside of the bank or the batch.
  """
  require_positive(temperature=temperature)
  require_not_negative(kl_weight=kl_weight)
  require_share(share=share)
  _require_rows(features, bank, columns=columns)
  batch = jnp.shape(features)[0]
  if jnp.ndim(columns) != 1 or jnp.shape(columns)[0] < batch:
    raise ValueError(
      f'columns must be a vector that begins with the {batch} rows of the batch, got '
      f'{jnp.shape(columns)}.'
    )
  if partners is not None:
    _require_ids('partners', partners, batch)
  features, rows = accumulated(features, jnp.asarray(bank)[columns])
  cosines = normalize(features) @ jax.lax.stop_gradient(rows).T
  present = jnp.ones((), bool) if where is None else jnp.asarray(where)
  log_p = jax.nn.log_softmax(jnp.where(present, cosines / temperature, -jnp.inf), axis=-1)
  own = jnp.arange(batch)
  cross_entropy = -jnp.mean(log_p[own, own])
  if partners is not None:
    mixed = -jnp.mean(log_p[own, partners])
    cross_entropy = share * cross_entropy + (1 - share) * mixed
  kl = sqrt_kl(cosines, power, where=where)
  return BankLoss(cross_entropy + kl_weight * kl, cross_entropy, kl, cosines)


def sample_columns(
  key: jax.Array, ids: ArrayLike, count: int, size: int
) -> tuple[jax.Array, jax.Array]:
  """Draws the rows of a bank that a batch is compared with: its own, and negatives.

  Args:
    key: a typed key.
    ids: int `[batch]`, rows of the batch.
    count: negatives that are drawn of all rows, without replacement; `size`: all rows as they lie. Static.
    size: rows of the bank; static.

  Returns:
    The rows, int32 `[batch + count]`, and which are there, bool: not those drawn that are in the batch.

  Raises:
    ValueError: if `count` is negative or exceeds the bank.
  """
  if not 0 <= count <= size:
    raise ValueError(f'count is {count}, expected 0 to {size}, the rows of the bank.')
  ids = jnp.asarray(ids, jnp.int32)
  drawn = jnp.arange(size, dtype=jnp.int32)
  if count < size:
    drawn = jax.random.choice(key, size, (count,), replace=False).astype(jnp.int32)
  new = jnp.all(drawn[:, None] != ids, axis=1)
  return jnp.concatenate([ids, drawn]), jnp.concatenate([jnp.ones(ids.shape, bool), new])


def bank_init(bank: ArrayLike, batches: Iterable[tuple[ArrayLike, ArrayLike]]) -> jax.Array:
  """Writes features of all images into a bank: `row_i = normalize(feature_i)`.

  Args:
    bank: zeros `[images, dim]`, sharded as the bank is to be; its memory is used up.
    batches: pairs of int `[batch]`, distinct rows, and features `[batch, dim]`, such as those of a network
      as drawn. Of an image that comes twice the last features stay.

  Returns:
    The bank; rows that no batch names as they were.

  Raises:
    ValueError: if shapes do not fit, or rows are outside of the bank or twice in a batch.

  References:
    The paper's initialization of the bank.

  Examples:
    >>> bank_init(jnp.zeros((3, 2)), [([2, 0], jnp.array([[3.0, 4.0], [0.0, 2.0]]))]).tolist()
    [[0.0, 1.0], [0.0, 0.0], [0.6000000238418579, 0.800000011920929]]
  """
  for ids, features in batches:
    _require_rows(features, bank, ids=ids)
    _require_distinct(ids)
    bank = _write(bank, jnp.asarray(ids), features)
  return bank


@functools.partial(jax.jit, donate_argnums=0)
def _write(bank: jax.Array, ids: jax.Array, features: jax.Array) -> jax.Array:
  return bank_update_ema(bank, ids, features, 0.0)


def bank_update_ema(
  bank: ArrayLike, ids: ArrayLike, features: ArrayLike, momentum: float = 0.5
) -> jax.Array:
  """Moves each image's row: `normalize(momentum * row + (1 - momentum) * normalize(feature))`.

  Args:
    bank: unit rows, `[images, dim]`.
    ids: int `[batch]`, distinct.
    features: `[batch, dim]`; carry no gradient.
    momentum: share of the row that is kept.

  Returns:
    The new bank; all other rows as they were.

  Raises:
    ValueError: if `momentum` is not in [0, 1], shapes do not fit, or (concrete) `ids` are outside of the bank
      or hold a row twice.
  """
  require_share(momentum=momentum)
  _require_rows(features, bank, ids=ids)
  _require_distinct(ids)
  bank, features = jnp.asarray(bank), normalize(jax.lax.stop_gradient(jnp.asarray(features)))
  rows = momentum * bank[ids] + (1 - momentum) * features
  return bank.at[ids].set(normalize(rows).astype(bank.dtype))


def bank_update_gradient(
  bank: ArrayLike,
  columns: ArrayLike,
  features: ArrayLike,
  cosines: ArrayLike,
  temperature: ArrayLike = 0.2,
  momentum: float = 0.5,
  *,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Moves all compared rows along the gradient of the cross-entropy.

    p = softmax(cosines / temperature)
    row_k <- normalize(momentum * row_k + (1 - momentum) * sum_n (1[k is n's own] - p_nk) z_n)

  `bank_update_ema` is the same without `p`. [inferred]: the paper derives its correction from this gradient;
  its constants are not known and its code has the moving average alone.

  Args:
    bank: unit rows, `[images, dim]`.
    columns: see `memory_bank_loss`; no row twice where `where` is True.
    features: `[batch, dim]`; carry no gradient.
    cosines: of `memory_bank_loss`.
    temperature: as there.
    momentum: share of a row that is kept.
    where: as there.

  Returns:
    The new bank.

  Raises:
    ValueError: if `momentum` is not in [0, 1], `temperature` is not positive, shapes do not fit, or
      (concrete) `columns` are outside of the bank.
  """
  require_share(momentum=momentum)
  require_positive(temperature=temperature)
  _require_rows(features, bank, columns=columns)
  bank, features = jnp.asarray(bank), normalize(jax.lax.stop_gradient(jnp.asarray(features)))
  present = jnp.ones(jnp.shape(columns), bool) if where is None else jnp.asarray(where)
  logits = jax.lax.stop_gradient(jnp.asarray(cosines)) / temperature
  p = jax.nn.softmax(jnp.where(present, logits, -jnp.inf), axis=-1)
  target = jnp.eye(*p.shape, dtype=p.dtype)
  rows = momentum * bank[columns] + (1 - momentum) * (target - p).T @ features
  # A row that is not there stands for one of the batch, which is written by its own column.
  places = jnp.where(present, columns, bank.shape[0])
  return bank.at[places].set(normalize(rows).astype(bank.dtype), mode='drop')


def _require_rows(features: ArrayLike, bank: ArrayLike, **ids: ArrayLike) -> None:
  """Raises ValueError unless features and bank have one dimension and `ids` are rows of the bank."""
  shapes = jnp.shape(features), jnp.shape(bank)
  if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][1]:
    raise ValueError(
      f'Expected features [batch, dim] and bank [images, dim], got {shapes[0]} and {shapes[1]}.'
    )
  for name, values in ids.items():
    _require_ids(name, values, shapes[1][0])


def _require_distinct(ids: ArrayLike) -> None:
  if is_concrete(ids) and len(np.unique(np.asarray(ids))) < np.size(ids):
    raise ValueError('ids holds a row twice: of two writes to one row, either could be the last.')


def _require_ids(name: str, values: ArrayLike, count: int) -> None:
  if is_concrete(values) and np.size(values):
    values = np.asarray(values)
    low, high = values.min(), values.max()
    if low < 0 or high >= count:
      raise ValueError(f'{name} must lie in 0 to {count - 1}, got {low} to {high}.')
