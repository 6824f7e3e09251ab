"""Linear classifiers on frozen features: the training recipes of published linear evaluations.

Features are computed once and cached, so each recipe is one jitted loop over an array; calls with equal
shapes and options share one compilation. A probe is returned as arrays, to be applied to any features of
the same dimension (`probe_logits`): also to those of the network after quantization or pruning.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxlab.evaluation._arguments import require_features
from jaxlab.evaluation.classification import top_k_accuracy
from jaxlab.losses._labels import require_classes, require_multi_labels


class Probe(NamedTuple):
  """A linear classifier: `logits = ((features - mean) * scale) @ kernel + bias`.

  Attributes:
    kernel: `[dim, num_classes]`.
    bias: `[num_classes]`.
    mean: `[dim]`, zeros if features are taken as they are.
    scale: `[dim]`, ones if features are taken as they are.
    gradient: scalar, the largest entry of the objective's gradient where the fit ended, by which it may be
      judged (see `converged`); None for recipes that are made to end elsewhere.
  """

  kernel: jax.Array
  bias: jax.Array
  mean: jax.Array
  scale: jax.Array
  gradient: jax.Array | None = None

  @property
  def converged(self) -> jax.Array:
    """Whether the fit is within 1e-4 of a stationary point, bool; not defined without `gradient`."""
    if self.gradient is None:
      raise ValueError(
        'This probe was trained by a recipe of fixed length, which does not converge.'
      )
    return self.gradient <= 1e-4


def probe_logits(probe: Probe, features: ArrayLike) -> jax.Array:
  """Returns the logits of features: `[..., dim] -> [..., num_classes]`."""
  features = (_wide(features) - probe.mean) * probe.scale
  return features @ probe.kernel + probe.bias


@jax.jit
def _accuracy(probe: Probe, features: jax.Array, labels: jax.Array) -> jax.Array:
  return top_k_accuracy(probe_logits(probe, features), labels).astype(jnp.float32)


def probe_accuracy(probe: Probe, features: ArrayLike, labels: ArrayLike) -> jax.Array:
  """Returns the share of features that a probe classifies correctly, a float32 scalar in [0, 1].

  Raises:
    ValueError: if shapes do not fit, or (where they are concrete) labels are out of range or features are
      not finite.
  """
  require_features('features', features, jnp.size(labels))
  require_classes(labels, probe.bias.size)
  if jnp.shape(features)[1] != probe.kernel.shape[0]:
    raise ValueError(
      f'The probe takes features of dimension {probe.kernel.shape[0]}, got {jnp.shape(features)}.'
    )
  return _accuracy(probe, features, labels)


def linear_probe_sgd(
  key: jax.Array,
  features: ArrayLike,
  labels: ArrayLike,
  *,
  num_classes: int,
  learning_rate: float = 30.0,
  momentum: float = 0.9,
  weight_decay: float = 0.0,
  epochs: int = 100,
  batch_size: int = 256,
  milestones: tuple[int, ...] | None = (60, 80),
) -> Probe:
  """Trains a linear classifier by SGD; the defaults are the recipe of MoCo.

  PyTorch's SGD with momentum; kernel from N(0, 0.01^2), bias 0; every epoch is a new permutation, with
  the remainder as a smaller last batch. DINO's recipe: `learning_rate=0.001 * batch_size / 256`,
  `milestones=None`.

  Args:
    key: a typed PRNG key, for the initial kernel and the order of the examples.
    features: `[examples, dim]`.
    labels: integers, `[examples]`.
    num_classes: number of classes.
    learning_rate: of the first epoch. 30 in MoCo, where features are unnormalized and pooled.
    momentum: of SGD.
    weight_decay: of SGD, on all parameters.
    epochs: passes over the features.
    batch_size: examples a step (all, if there are fewer).
    milestones: the learning rate is multiplied by 0.1 from these epochs on; None for half a cosine to 0,
      changed every epoch.

  Returns:
    The trained probe.

  Raises:
    ValueError: if shapes do not fit, (concrete) labels are out of range, or a size is not positive.

  References:
    He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020
    (https://arxiv.org/abs/1911.05722), section 4.1 and code.
  """
  milestones = None if milestones is None else tuple(milestones)
  return _train(
    key, features, labels, num_classes, learning_rate, momentum, weight_decay,
    epochs=epochs, batch_size=batch_size, milestones=milestones,
  )  # fmt: skip


def linear_probe_lars(
  key: jax.Array,
  features: ArrayLike,
  labels: ArrayLike,
  *,
  num_classes: int,
  learning_rate: float = 0.1,
  momentum: float = 0.9,
  weight_decay: float = 0.0,
  trust_coefficient: float = 0.001,
  epochs: int = 90,
  warmup_epochs: int = 0,
  batch_size: int = 4096,
  standardize: bool = False,
) -> Probe:
  """Trains a linear classifier by LARS; the defaults are the recipe of SimSiam.

  Learning rate `learning_rate * batch_size / 256`, half a cosine to 0 changed every epoch. The kernel's
  gradient is scaled by `trust_coefficient |kernel| / |gradient|` before it enters the momentum buffer,
  the bias's is not (and has no weight decay). Initial values and batches as in `linear_probe_sgd`.
  MAE's recipe: `batch_size=16384, warmup_epochs=10, standardize=True`.

  Args:
    key: a typed PRNG key, for the initial kernel and the order of the examples.
    features: `[examples, dim]`.
    labels: integers, `[examples]`.
    num_classes: number of classes.
    learning_rate: for 256 examples a batch; scaled with the batch size that is used.
    momentum: of LARS.
    weight_decay: of LARS, on the kernel.
    trust_coefficient: eta of LARS.
    epochs: passes over the features.
    warmup_epochs: of them, epochs in which the learning rate grows linearly, every step.
    batch_size: examples a step (all, if there are fewer).
    standardize: bring each dimension to mean 0 and variance 1 over all features, in the place of a batch
      normalization without affine parameters.

  Returns:
    The trained probe.

  Raises:
    ValueError: if shapes do not fit, (concrete) labels are out of range, or a size is not positive.

  References:
    Chen & He, Exploring Simple Siamese Representation Learning, CVPR 2021
    (https://arxiv.org/abs/2011.10566), appendix A; You et al., Large Batch Training of Convolutional
    Networks (https://arxiv.org/abs/1708.03888).
  """
  batch_size = min(batch_size, jnp.shape(features)[0])
  return _train(
    key, features, labels, num_classes, learning_rate * batch_size / 256, momentum, weight_decay,
    trust_coefficient, epochs=epochs, warmup_epochs=warmup_epochs, batch_size=batch_size,
    standardize=standardize, lars=True,
  )  # fmt: skip


def logistic_probe(
  features: ArrayLike,
  labels: ArrayLike,
  *,
  num_classes: int,
  steps: int = 1500,
  learning_rate: float = 0.1,
  l2: float = 1e-4,
) -> Probe:
  """Fits multinomial logistic regression on standardized features by full-batch Adam.

  Minimizes `mean(cross-entropy) + l2 * sum(kernel^2)` from zero, with a learning rate of half a cosine to
  0. The result says how far it is from the optimum (`Probe.converged`). Deterministic, and free of the
  learning rate's tuning that feature scales ask of SGD; for up to some ten thousand features. Maps over
  feature sets with `jax.vmap`.

  Args:
    features: `[examples, dim]`; each dimension is brought to mean 0 and variance 1 (a constant one to 0).
    labels: integers, `[examples]`.
    num_classes: number of classes.
    steps: Adam steps.
    learning_rate: of the first step.
    l2: weight of the penalty; scikit-learn's `C` is `1 / (2 l2 examples)`.

  Returns:
    The fitted probe, which standardizes by the statistics of `features`, with its `gradient`.

  Raises:
    ValueError: if shapes do not fit, or (where they are concrete) labels are out of range or features are
      not finite.
  """
  _require(features, labels, num_classes, steps=steps)
  return _logistic(features, labels, learning_rate, l2, num_classes, steps)


def multi_label_probe(
  features: ArrayLike,
  labels: ArrayLike,
  *,
  steps: int = 1500,
  learning_rate: float = 0.1,
  l2: float = 1e-4,
) -> Probe:
  """Fits a logistic regression for each class, one against the rest, on standardized features.

  Minimizes `mean(sum over classes of binary cross-entropy) + l2 * sum(kernel^2)`, which is one problem for
  each class, as `logistic_probe` does. `probe_logits` gives the logits of every class.

  Args:
    features: `[examples, dim]`; each dimension is brought to mean 0 and variance 1 (a constant one to 0).
    labels: 0 or 1 for each class, `[examples, num_classes]`.
    steps: Adam steps.
    learning_rate: of the first step.
    l2: weight of the penalty; scikit-learn's `C` is `1 / (2 l2 examples)`.

  Returns:
    The fitted probe, which standardizes by the statistics of `features`, with its `gradient`.

  Raises:
    ValueError: if shapes do not fit, or (where they are concrete) labels are others than 0 and 1 or features
      are not finite.
  """
  if jnp.ndim(labels) != 2 or 0 in jnp.shape(labels):
    raise ValueError(f'labels must be [examples, num_classes], got {jnp.shape(labels)}.')
  require_features('features', features, jnp.shape(labels)[0])
  require_multi_labels(labels=labels)
  if steps < 1:
    raise ValueError(f'steps must be positive, got {steps}.')
  return _logistic(features, labels, learning_rate, l2, jnp.shape(labels)[1], steps)


@functools.partial(jax.jit, static_argnames=('num_classes', 'steps'))
def _logistic(features, labels, learning_rate, l2, num_classes: int, steps: int) -> Probe:
  """Fits one softmax to integer labels, or a sigmoid for each column of `[examples, num_classes]`."""
  features = _wide(features)
  mean, scale = _moments(features, standardize=True)
  features = (features - mean) * scale
  single = labels.ndim == 1
  if single:
    targets = jax.nn.one_hot(labels, num_classes, dtype=features.dtype)
  else:
    targets = jnp.asarray(labels, features.dtype)
  optimizer = optax.adam(optax.cosine_decay_schedule(1.0, steps))

  def loss(params):
    # Weights as [num_classes, dim]: the gradient's product reads the features in memory order, which
    # halves a step's time on CPU.
    weights, bias = params
    logits = features @ weights.T + bias
    if single:
      nll = optax.softmax_cross_entropy(logits, targets)
    else:
      nll = jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), -1)
    return jnp.mean(nll) + l2 * jnp.sum(weights**2)

  def step(carry, _):
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    # The rate is traced, so that another one needs no new compilation.
    params = jax.tree.map(lambda p, u: p + learning_rate * u, params, updates)
    return (params, state), None

  dim = features.shape[1]
  params = (jnp.zeros((num_classes, dim), features.dtype), jnp.zeros(num_classes, features.dtype))
  ((weights, bias), _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
  gradients = jax.tree.leaves(jax.grad(loss)((weights, bias)))
  largest = jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in gradients]))
  return Probe(weights.T, bias, mean, scale, largest)


def _train(
  key, features, labels, num_classes, learning_rate, momentum, weight_decay, trust_coefficient=0.001,
  *, epochs, batch_size, warmup_epochs=0, milestones=None, standardize=False, lars=False,
) -> Probe:  # fmt: skip
  """Checks the arguments of a recipe, lays out its learning rates and runs it."""
  _require(features, labels, num_classes, epochs=epochs, batch_size=batch_size)
  if not 0 <= warmup_epochs < epochs:
    raise ValueError(f'warmup_epochs must be in [0, epochs = {epochs}), got {warmup_epochs}.')
  count = jnp.shape(features)[0]
  batch_size = min(batch_size, count)
  shape = epochs, math.ceil(count / batch_size)
  epoch = np.arange(epochs)[:, None]
  if milestones is None:
    share = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    falling = (1 + np.cos(np.pi * share)) / 2
  else:
    falling = 0.1 ** np.sum(epoch >= np.array(milestones), axis=1, keepdims=True)
  rising = np.arange(math.prod(shape)).reshape(shape) / max(warmup_epochs * shape[1], 1)
  factors = np.where(epoch < warmup_epochs, rising, falling)
  hyper = (learning_rate, momentum, weight_decay, trust_coefficient)
  return _minibatch(
    key, features, labels, factors, hyper, num_classes, batch_size, standardize, lars
  )


@functools.partial(jax.jit, static_argnums=range(5, 9))
def _minibatch(
  key, features, labels, factors, hyper, num_classes: int, batch_size: int, standardize: bool, lars: bool
) -> Probe:  # fmt: skip
  """Runs one step of SGD or LARS for each of the learning-rate factors, `[epochs, steps]`."""
  learning_rate, momentum, weight_decay, trust_coefficient = hyper
  features = _wide(features)
  mean, scale = _moments(features, standardize)
  features = (features - mean) * scale
  count, dim = features.shape
  epochs, steps = factors.shape

  def loss(params, rows, valid):
    kernel, bias = params
    logits = features[rows] @ kernel + bias
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
    return jnp.sum(nll * valid) / jnp.sum(valid)

  def direction(gradient, param):
    if lars and param.ndim < 2:
      return gradient
    gradient = gradient + weight_decay * param
    if not lars:
      return gradient
    norms = jnp.linalg.norm(param), jnp.linalg.norm(gradient)
    ratio = trust_coefficient * norms[0] / jnp.where(norms[1] > 0, norms[1], 1)
    return gradient * jnp.where((norms[0] > 0) & (norms[1] > 0), ratio, 1)

  def update(carry, batch):
    params, velocity = carry
    factor, rows, valid = batch
    directions = jax.tree.map(direction, jax.grad(loss)(params, rows, valid), params)
    velocity = jax.tree.map(lambda v, d: momentum * v + d, velocity, directions)
    params = jax.tree.map(lambda p, v: p - learning_rate * factor * v, params, velocity)
    return (params, velocity), None

  def epoch(carry, xs):
    epoch_key, epoch_factors = xs
    # The last batch is filled up with rows that have no weight.
    order = jnp.pad(jax.random.permutation(epoch_key, count), (0, steps * batch_size - count))
    valid = (jnp.arange(order.size) < count).astype(features.dtype)
    batches = epoch_factors, order.reshape(steps, -1), valid.reshape(steps, -1)
    return jax.lax.scan(update, carry, batches)

  init_key, order_key = jax.random.split(key)
  kernel = 0.01 * jax.random.normal(init_key, (dim, num_classes), features.dtype)
  params = (kernel, jnp.zeros(num_classes, features.dtype))
  carry = (params, jax.tree.map(jnp.zeros_like, params))
  factors = jnp.asarray(factors, features.dtype)
  (params, _), _ = jax.lax.scan(epoch, carry, (jax.random.split(order_key, epochs), factors))
  return Probe(*params, mean, scale)


def _moments(features: jax.Array, standardize: bool) -> tuple[jax.Array, jax.Array]:
  """Returns mean and inverse deviation of each dimension, or zeros and ones."""
  dim, dtype = features.shape[1], features.dtype
  if not standardize:
    return jnp.zeros(dim, dtype), jnp.ones(dim, dtype)
  mean, deviation = jnp.mean(features, axis=0), jnp.std(features, axis=0)
  # What varies by rounding alone is constant: dividing by it would blow noise up to a feature.
  constant = deviation <= 1e-6 * jnp.max(jnp.abs(features), axis=0)
  return mean, jnp.where(constant, 0, 1 / jnp.where(constant, 1, deviation))


def _require(features: ArrayLike, labels: ArrayLike, num_classes: int, **sizes: int) -> None:
  if jnp.ndim(labels) != 1:
    raise ValueError(f'labels must be [examples], got {jnp.shape(labels)}.')
  require_features('features', features, jnp.size(labels))
  require_classes(labels, num_classes)
  for name, value in sizes.items():
    if value < 1:
      raise ValueError(f'{name} must be positive, got {value}.')


def _wide(features: ArrayLike) -> jax.Array:
  return jnp.asarray(features).astype(jnp.promote_types(jnp.result_type(features), jnp.float32))
