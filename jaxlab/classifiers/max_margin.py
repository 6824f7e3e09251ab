"""IbM2, the instance-based max-margin classifier (Fu et al., CVPR 2024, arXiv 2305.17368).

A linear head learns from features with Gaussian noise. In many dimensions the noise has nearly the length
`epsilon |sigma|`, so fitting all noisy copies keeps a margin of that radius around every labeled feature.
The largest epsilon at which the head still fits is found by bisection. Everything is traceable: the search
is one program, and `jax.vmap` runs it for several draws of a few-shot set at once:

  head = margin_head(num_classes)
  fit = lambda key, x, y: fit_max_margin(key, head, x, y)
  found = jax.jit(jax.vmap(fit))(jax.random.split(key, 3), features, labels)  # [3, examples, dim]
  logits = jax.vmap(lambda params: head.apply({'params': params}, test_features))(found.params)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from jaxlab.classifiers.bisection import bisect_epsilon_compiled, num_iterations
from jaxlab.classifiers.noisy_head import (
  feature_std,
  initial_params,
  noisy_accuracy,
  require_examples,
  train_head,
)
from jaxlab.models.classifier_heads import WeightNormHead

Array = jax.Array
PyTree = Any


class Search(NamedTuple):
  """What `search_epsilon` finds.

  Attributes:
    epsilon: scalar, the midpoint of the last interval.
    threshold: training accuracy that the noisy copies must exceed, `min(max_threshold, a0)` with `a0` that
      of a head trained without noise.
    trace: `[iterations, 4]`: epsilon, noisy training accuracy, and the interval's ends before the iteration.
    interval: `[2]`, the last interval.
    params: of the head that was carried through all iterations.
  """

  epsilon: Array
  threshold: Array
  trace: Array
  interval: Array
  params: PyTree


class MaxMargin(NamedTuple):
  """What `fit_max_margin` returns: the search, and the parameters of the head trained at its epsilon."""

  search: Search
  params: PyTree


def margin_head(num_classes: int, scale: float = 10.0, eps: float = 1e-5) -> WeightNormHead:
  """Returns IbM2's head: `z_c = scale * x / (|x| + eps) . (g_c v_c / |v_c|)`.

  Raises:
    ValueError: for fewer than two classes, between which there is no margin.
  """
  if num_classes < 2:
    raise ValueError(f'margin_head: num_classes={num_classes}; a margin lies between two classes.')
  return WeightNormHead(num_classes, scale, eps)


def search_epsilon(
  key: Array,
  head: nn.Module,
  features: ArrayLike,
  labels: ArrayLike,
  *,
  num_copies: int = 200,
  right: float = 10.0,
  tolerance: float = 0.05,
  max_threshold: float = 0.9,
  learning_rate: float = 1.0,
  epochs: int = 20,
  threshold_epochs: int = 100,
  batch_size: int = 256,
  smoothing: float = 0.1,
  chunk_size: int | None = None,
  sharding: jax.sharding.Sharding | None = None,
) -> Search:
  """Finds the largest noise that a head still fits; one traceable program, see the module for `vmap`.

  A head trained without noise for `threshold_epochs` gives the threshold. A second one goes through the
  bisection: `epochs` of training at the midpoint, from where the iteration before left it, then its
  accuracy on `num_copies` fresh noisy copies of each training feature. Constants are the official code's
  for vision transformers; ResNet-50 has `batch_size=512, threshold_epochs=60`.

  Where the features cannot be fitted even without noise the threshold is that low accuracy, and epsilon
  may come out near 0. Where epsilon comes out at `right` the range is too small.

  Args:
    key: a typed PRNG key.
    head: from `margin_head`.
    features: `[examples, dim]`, unit rows.
    labels: integers `[examples]`.
    num_copies: noisy copies of an example, in a step and in the evaluation.
    right: largest epsilon considered.
    tolerance: length below which the interval is small enough; above `right` nothing is searched, and
      epsilon is `right / 2`.
    max_threshold: cap of the threshold.
    learning_rate: of threshold and search, for 256 examples a step.
    epochs: of each iteration, with a new optimizer and schedule.
    threshold_epochs: of the head without noise.
    batch_size: as in `train_head`, as are the rest.
    smoothing: of the labels.
    chunk_size: examples whose copies are in memory at a time.
    sharding: of the axis of examples of a chunk.

  Raises:
    ValueError: as `train_head`, or if `right` or `tolerance` is not positive.
  """
  num_iterations(right, tolerance)  # raises before any work
  require_examples(features, labels)
  sigma = feature_std(features)
  shared = {'batch_size': batch_size, 'smoothing': smoothing, 'learning_rate': learning_rate}
  cost = {'chunk_size': chunk_size, 'sharding': sharding}
  noise = {'sigma': sigma, 'num_copies': num_copies}
  clean_key, search_key, train_key, eval_key = jax.random.split(key, 4)

  clean_init, clean_train = jax.random.split(clean_key)
  clean = train_head(
    clean_train, head, initial_params(clean_init, head, features), features, labels,
    sigma=sigma, epochs=threshold_epochs, **shared, **cost,
  )  # fmt: skip
  accuracy = noisy_accuracy(clean_train, head, clean, features, labels, sigma=sigma)
  threshold = jnp.minimum(accuracy, max_threshold)

  def evaluate(params, epsilon, iteration):
    params = train_head(
      jax.random.fold_in(train_key, iteration), head, params, features, labels,
      epsilon=epsilon, epochs=epochs, **noise, **shared, **cost,
    )  # fmt: skip
    accuracy = noisy_accuracy(
      jax.random.fold_in(eval_key, iteration), head, params, features, labels,
      epsilon=epsilon, **noise, chunk_size=chunk_size or batch_size, sharding=sharding,
    )  # fmt: skip
    return params, accuracy

  params, epsilon, interval, trace = bisect_epsilon_compiled(
    evaluate,
    initial_params(search_key, head, features),
    threshold,
    right=right,
    tolerance=tolerance,
  )
  return Search(epsilon, threshold, trace, interval, params)


def fit_max_margin(
  key: Array,
  head: nn.Module,
  features: ArrayLike,
  labels: ArrayLike,
  *,
  learning_rate: float = 0.05,
  epochs: int = 100,
  num_copies: int = 200,
  batch_size: int = 256,
  smoothing: float = 0.1,
  chunk_size: int | None = None,
  sharding: jax.sharding.Sharding | None = None,
  **search: Any,
) -> MaxMargin:
  """Runs all of IbM2: threshold, bisection, and a fresh head trained at the epsilon that was found.

  Args:
    key: a typed PRNG key.
    head: from `margin_head`.
    features: `[examples, dim]`, unit rows.
    labels: integers `[examples]`.
    learning_rate: of the final training, for 256 examples a step; the search has its own.
    epochs: of the final training.
    num_copies: as in `search_epsilon`, as are those up to `sharding`.
    batch_size: examples a step.
    smoothing: of the labels.
    chunk_size: examples whose copies are in memory at a time.
    sharding: of the axis of examples of a chunk.
    **search: further arguments of `search_epsilon` under the names `search_learning_rate`,
      `search_epochs`, `threshold_epochs`, `right`, `tolerance` and `max_threshold`.

  Raises:
    ValueError: as `search_epsilon`.
  """
  shared = {
    'num_copies': num_copies,
    'batch_size': batch_size,
    'smoothing': smoothing,
    'chunk_size': chunk_size,
    'sharding': sharding,
  }
  search = {name.removeprefix('search_'): value for name, value in search.items()}
  search_key, init_key, train_key = jax.random.split(key, 3)
  found = search_epsilon(search_key, head, features, labels, **shared, **search)
  params = train_head(
    train_key, head, initial_params(init_key, head, features), features, labels,
    epsilon=found.epsilon, learning_rate=learning_rate, epochs=epochs, **shared,
  )  # fmt: skip
  return MaxMargin(found, params)
