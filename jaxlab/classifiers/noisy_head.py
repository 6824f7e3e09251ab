"""Linear heads that learn from, and are judged on, noisy copies of cached features."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated
from jaxlab.losses._labels import require_classes
from jaxlab.losses.classification import label_smoothing_cross_entropy
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any


def feature_std(features: ArrayLike) -> Array:
  """Returns the unbiased deviation of each channel over all examples, `[examples, dim] -> [dim]`.

  A constant channel has deviation 0 and will get no noise.

  Raises:
    ValueError: for fewer than two examples, which have no deviation.
  """
  (features,) = accumulated(features)
  if features.ndim != 2 or len(features) < 2:
    raise ValueError(
      f'feature_std: features must be [examples, dim] with at least 2 examples, got {features.shape}.'
    )
  return jnp.std(features, axis=0, ddof=1)


def add_noise(features: ArrayLike, sigma: ArrayLike, epsilon: ArrayLike, noise: ArrayLike) -> Array:
  """Returns `x_i + epsilon * sigma * noise_im`, copies `[examples, copies, dim]`.

  Args:
    features: `[examples, dim]`.
    sigma: deviation of each channel, `[dim]`, see `feature_std`.
    epsilon: scalar.
    noise: standard normal, `[examples, copies, dim]`.
  """
  return jnp.asarray(features)[:, None] + jnp.asarray(epsilon * sigma) * noise


def perturb_features(
  key: Array, features: ArrayLike, sigma: ArrayLike, epsilon: ArrayLike, num_copies: int
) -> Array:
  """Returns noisy copies of features, `[examples * num_copies, dim]`, an example's copies in a row.

  Example `i` has a stream of its own, `fold_in(key, i)`.

  Args:
    key: a typed PRNG key.
    features: `[examples, dim]`.
    sigma: `[dim]`.
    epsilon: scalar.
    num_copies: per example, static.

  Raises:
    ValueError: if `num_copies` is not positive.
  """
  features = jnp.asarray(features)
  copies = _copies(key, features, jnp.arange(len(features)), sigma, epsilon, num_copies)
  return copies.reshape(-1, features.shape[1])


def perturbed_loss(
  head: nn.Module,
  params: PyTree,
  copies: ArrayLike,
  labels: ArrayLike,
  smoothing: float = 0.1,
) -> Array:
  """Returns the smoothed cross-entropy of every noisy copy, `[examples, copies]`; train on its mean.

  Args:
    head: features to logits.
    params: its parameters; the copies get no gradient.
    copies: `[examples, copies, dim]`, see `add_noise`.
    labels: integers `[examples]`.
    smoothing: share of the target spread over all classes.
  """
  copies = jax.lax.stop_gradient(jnp.asarray(copies))
  logits = head.apply({'params': params}, copies)
  labels = jnp.broadcast_to(jnp.asarray(labels)[:, None], logits.shape[:2])
  return label_smoothing_cross_entropy(logits, labels, smoothing)


def train_head(
  key: Array,
  head: nn.Module,
  params: PyTree,
  features: ArrayLike,
  labels: ArrayLike,
  *,
  sigma: ArrayLike | None = None,
  epsilon: ArrayLike = 0.0,
  num_copies: int = 1,
  learning_rate: float = 0.05,
  epochs: int = 100,
  batch_size: int = 256,
  smoothing: float = 0.1,
  chunk_size: int | None = None,
  sharding: jax.sharding.Sharding | None = None,
) -> PyTree:
  """Trains a head on fresh noisy copies of the features of every step; returns its parameters.

  Adam without weight decay at `learning_rate * batch_size / 256`, which falls by half a cosine to 0,
  changed every epoch. Every epoch is a new permutation, the last smaller batch is kept. The defaults are
  the paper's baseline, a head without noise. The order of examples, the kept last batch, and the rate where
  there are fewer examples than `batch_size` are inferred: the paper does not say. (With
  `batch_size=len(features)` the rate follows the examples that there are.)

  Args:
    key: a typed PRNG key, for order and noise.
    head: features to logits; without state or randomness.
    params: initial parameters.
    features: `[examples, dim]`, with unit rows in the paper.
    labels: integers `[examples]`.
    sigma: `[dim]`; None: `feature_std(features)`.
    epsilon: strength of the noise, scalar; may be traced.
    num_copies: noisy copies of an example in a step.
    learning_rate: for 256 examples a step. It is scaled by the *configured* batch size, also where there
      are fewer examples.
    epochs: passes over the features.
    batch_size: examples a step (all, if there are fewer), before copying.
    smoothing: of the labels.
    chunk_size: examples whose copies are in memory at a time (`chunk_size * num_copies * dim` numbers);
      None: the batch. The result does not depend on it but for rounding.
    sharding: of the axis of examples of a chunk, to share the work on copies between devices.

  Raises:
    ValueError: if shapes do not fit or a size is not positive; where values are concrete: labels that are
      no classes of the head, or features that are not finite.
  """
  features, labels = _examples(head, params, features, labels)
  sizes = {'num_copies': num_copies, 'epochs': epochs, 'batch_size': batch_size}
  _require_counts(**sizes, chunk_size=chunk_size or 1)
  sigma = feature_std(features) if sigma is None else accumulated(sigma)[0]
  count = len(features)
  rate = learning_rate * batch_size / 256
  batch_size = min(batch_size, count)
  steps, chunk = math.ceil(count / batch_size), min(chunk_size or batch_size, batch_size)
  filled = math.ceil(batch_size / chunk) * chunk
  optimizer = optax.scale_by_adam()

  def gradient(params, rows, valid, key):
    """Returns the mean loss's gradient over the `valid` rows `[chunks, chunk]`."""

    def loss(params, rows, valid):
      copies = _copies(key, features[rows], rows, sigma, epsilon, num_copies, sharding)
      losses = perturbed_loss(head, params, copies, labels[rows], smoothing)
      return jnp.sum(losses * valid[:, None])

    def add(total, chunk):
      return jax.tree.map(jnp.add, total, jax.grad(loss)(params, *chunk)), None

    if len(rows) == 1:
      total = jax.grad(loss)(params, rows[0], valid[0])
    else:
      total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (rows, valid))
    return jax.tree.map(lambda g: g / (jnp.sum(valid) * num_copies), total)

  def epoch(carry, xs):
    order_key, noise_key, rate = xs
    # In a single step order does not matter (and a sort is long to compile). The last batch, and the last
    # chunk of each, are filled up with rows that have no weight.
    order = jnp.arange(count) if steps == 1 else jax.random.permutation(order_key, count)
    order = jnp.pad(order, (0, steps * batch_size - count), constant_values=-1)
    order = order.reshape(steps, batch_size)
    order = jnp.pad(order, ((0, 0), (0, filled - batch_size)), constant_values=-1)
    order = order.reshape(steps, filled // chunk, chunk)
    valid = (order >= 0).astype(features.dtype)

    def step(carry, batch):
      params, state = carry
      rows, valid = batch
      updates, state = optimizer.update(gradient(params, rows, valid, noise_key), state)
      params = jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), params, updates)
      return (params, state), None

    return jax.lax.scan(step, carry, (jnp.maximum(order, 0), valid))

  cosine = (1 + np.cos(np.pi * np.arange(epochs) / epochs)) / 2
  rates = rate * jnp.asarray(cosine, features.dtype)
  keys = jax.random.split(key, (2, epochs))
  (params, _), _ = jax.lax.scan(epoch, (params, optimizer.init(params)), (*keys, rates))
  return params


def noisy_accuracy(
  key: Array,
  head: nn.Module,
  params: PyTree,
  features: ArrayLike,
  labels: ArrayLike,
  *,
  sigma: ArrayLike | None = None,
  epsilon: ArrayLike = 0.0,
  num_copies: int = 1,
  chunk_size: int = 256,
  sharding: jax.sharding.Sharding | None = None,
) -> Array:
  """Returns the share of noisy copies that a head classifies correctly, a scalar in [0, 1]; NaN for NaN.

  Heads that are given the same key see the same noise. Arguments as in `train_head`; for test features
  give the `sigma` of the training features.

  Raises:
    ValueError: as `train_head`.
  """
  features, labels = _examples(head, params, features, labels, 1 if sigma is not None else 2)
  _require_counts(num_copies=num_copies, chunk_size=chunk_size)
  sigma = feature_std(features) if sigma is None else accumulated(sigma)[0]
  count, chunk = len(features), min(chunk_size, len(features))
  rows = jnp.pad(jnp.arange(count), (0, -count % chunk), constant_values=-1).reshape(-1, chunk)

  def correct(rows):
    valid, rows = rows >= 0, jnp.maximum(rows, 0)
    copies = _copies(key, features[rows], rows, sigma, epsilon, num_copies, sharding)
    logits = head.apply({'params': params}, copies)
    hits = (jnp.argmax(logits, -1) == labels[rows][:, None]) & valid[:, None]
    return jnp.sum(hits, dtype=jnp.int32), jnp.any(jnp.isnan(logits))

  hits, undefined = correct(rows[0]) if len(rows) == 1 else jax.lax.map(correct, rows)
  share = jnp.sum(hits).astype(features.dtype) / (count * num_copies)
  return jnp.where(jnp.any(undefined), jnp.nan, share)


def initial_params(key: Array, head: nn.Module, features: ArrayLike) -> PyTree:
  """Returns fresh parameters of a head for these features, in the dtype of the computation."""
  (features,) = accumulated(features)
  params = head.init(key, features[:1])['params']
  return jax.tree.map(lambda p: p.astype(features.dtype), params)


def _copies(key, features, rows, sigma, epsilon, num_copies, sharding=None) -> Array:
  """Returns noisy copies `[examples, num_copies, dim]` of `features`, whose positions are `rows`.

  An example occurs once an epoch, so a key for the epoch and the position make a stream of its own.
  """
  _require_counts(num_copies=num_copies)
  shape = (num_copies, features.shape[1])
  if isinstance(epsilon, int | float) and epsilon == 0:
    return jnp.broadcast_to(features[:, None], (len(features), *shape))  # draws no noise for naught
  noise = jax.vmap(
    lambda row: jax.random.normal(jax.random.fold_in(key, row), shape, features.dtype)
  )(rows)
  copies = add_noise(features, sigma, epsilon, noise)
  return copies if sharding is None else jax.lax.with_sharding_constraint(copies, sharding)


def require_examples(features: ArrayLike, labels: ArrayLike, least: int = 2) -> None:
  """Raises ValueError unless there are at least `least` features, finite (if concrete), with labels."""
  shape, label_shape = jnp.shape(features), jnp.shape(labels)
  if len(shape) != 2 or shape[0] < least or not shape[1]:
    raise ValueError(
      f'features must be [examples, dim] with at least {least} examples, got {shape}.'
    )
  if label_shape != shape[:1] or not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
    raise ValueError(
      f'labels must be integers, one for each of the {shape[0]} features; got '
      f'{jnp.result_type(labels)} {label_shape}.'
    )
  if is_concrete(features):
    finite = np.isfinite(np.asarray(features, np.float32)).all(1)
    if not finite.all():
      raise ValueError(
        f'{np.sum(~finite)} of {len(finite)} features hold NaN or infinity, the first at position '
        f'{int(np.argmin(finite))}.'
      )


def _examples(head, params, features, labels, least: int = 2) -> tuple[Array, Array]:
  """Returns features in at least float32 and labels; raises ValueError if the head cannot take them."""
  require_examples(features, labels, least)
  (wide,) = accumulated(features)
  # Out of range, a label would give a loss without meaning and no error.
  logits = jax.eval_shape(lambda p, x: head.apply({'params': p}, x[:1]), params, wide)
  require_classes(labels, logits.shape[-1])
  return wide, jnp.asarray(labels)


def _require_counts(**sizes: int) -> None:
  for name, value in sizes.items():
    if value < 1:
      raise ValueError(f'{name}={value} must be at least 1.')
