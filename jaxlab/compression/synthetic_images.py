"""Images made of a trained network alone: noise, moved until the network sees a given class in it.

DeepInversion (Yin et al. 2020, arXiv 1912.08795) without its term of batch norms, which transformers lack.
Such images judge what is made of a network where there are too few real ones to judge by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

Array = jax.Array
PyTree = Any


def variation(images: ArrayLike, power: float = 1.0) -> Array:
  """Returns how much neighboring pixels differ: `sum over 4 directions of |difference|_2^power`.

  Right, below and both diagonals; each norm is over the whole batch.

  Args:
    images: `[batch, height, width, channels]`, at least 2x2 pixels.
    power: positive.

  Raises:
    ValueError: for arrays that are no such images, or a power that is not positive.

  >>> float(
  ...   variation(jnp.array([[0.0, 0.0], [3.0, 3.0]])[None, :, :, None])
  ... )  # twice sqrt(18), no difference
  10.242640495300293
  """
  x = jnp.asarray(images)
  if x.ndim != 4 or min(x.shape[1:3]) < 2:
    raise ValueError(
      f'images must be [batch, height, width, channels] of 2x2 or more, got {x.shape}.'
    )
  if not power > 0:
    raise ValueError(f'power={power}: expected a positive number.')
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  pairs = (
    (x[:, :, :-1], x[:, :, 1:]),
    (x[:, :-1], x[:, 1:]),
    (x[:, 1:, :-1], x[:, :-1, 1:]),
    (x[:, :-1, :-1], x[:, 1:, 1:]),
  )
  squares = jnp.stack([jnp.sum(jnp.square(a - b)) for a, b in pairs])
  # The slope of a root at 0 is infinite: equal pixels have none.
  safe = jnp.where(squares > 0, squares, 1.0)
  return jnp.sum(jnp.where(squares > 0, safe ** (power / 2), 0.0))


def distinct_labels(key: Array, count: int, num_classes: int) -> Array:
  """Returns int32 `[count]` labels in a drawn order, each class as often as any other, give or take one."""
  if count < 1 or num_classes < 1:
    raise ValueError(f'count={count}, num_classes={num_classes}: expected at least 1.')
  rounds = jax.random.split(key, -(-count // num_classes))
  orders = jax.vmap(lambda own: jax.random.permutation(own, num_classes))(rounds)
  return orders.reshape(-1)[:count].astype(jnp.int32)


def synthesize(
  key: Array,
  predict: Callable[[Array], Array],
  labels: ArrayLike,
  image_shape: tuple[int, int, int],
  *,
  low: ArrayLike,
  high: ArrayLike,
  steps: int = 2000,
  learning_rate: float = 0.25,
  betas: tuple[float, float] = (0.5, 0.9),
  warmup_steps: int = 100,
  shift: int = 30,
  flip: bool = True,
  variation_weight: float = 1e-4,
  variation_power: float = 1.0,
  norm_weight: float = 1e-5,
) -> tuple[Array, Array]:
  """Makes images that a network takes for given classes.

    loss = mean CE(predict(x), label) + variation_weight variation(x, power) + norm_weight mean |x|_2

  is minimized over the pixels by Adam, from standard normal noise, at a rate that rises linearly and falls to
  0 as a cosine. In each step the whole batch is rolled by one random offset a side, and flipped with
  probability 1/2, before the network sees it; behind each step pixels are clipped to the valid range. The
  images of the lowest loss are returned.

  Args:
    key: of noise, offsets and flips.
    predict: `[batch, *image_shape] -> [batch, num_classes]`, logits of the trained network.
    labels: integers `[batch]`.
    image_shape: height, width, channels; static.
    low: value of a black pixel as the network reads it, a number or `[channels]`.
    high: likewise of a white one.
    steps: of Adam.
    learning_rate: its largest.
    betas: of Adam.
    warmup_steps: of the linear rise.
    shift: largest offset, in pixels.
    flip: whether images are mirrored.
    variation_weight: of `variation`.
    variation_power: 1, or 0.6 for ViTs as DC-ViT has it.
    norm_weight: of the images' mean norm.

  Returns:
    The images, float32 `[batch, *image_shape]`, and the loss `[steps]` in front of each step.

  Raises:
    ValueError: for numbers out of their range, or labels that are no vector.

  References:
    Zhang et al., Dense Vision Transformer Compression with Few Samples, CVPR 2024
    (https://arxiv.org/abs/2403.18708), constants of the official code for images of 224 pixels.
  """
  labels = jnp.asarray(labels)
  if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f'labels must be integers [batch], got {labels.dtype} {labels.shape}.')
  if not 0 <= warmup_steps < steps:
    raise ValueError(f'warmup_steps={warmup_steps}, steps={steps}: expected 0 <= warmup < steps.')
  if not 0 <= shift < min(image_shape[:2]):
    raise ValueError(f'shift={shift}: expected 0 up to the side of {image_shape} less one.')
  if not learning_rate > 0 or min(variation_weight, norm_weight) < 0:
    raise ValueError(
      f'learning_rate={learning_rate}, variation_weight={variation_weight}, norm_weight={norm_weight}: '
      'expected a positive rate, and weights that are not negative.'
    )
  rise = max(warmup_steps, 1)
  rates = optax.warmup_cosine_decay_schedule(
    learning_rate / rise, learning_rate, warmup_steps, steps
  )
  optimizer = optax.adam(rates, *betas)
  noise_key, step_key = jax.random.split(key)
  start = jax.random.normal(noise_key, (len(labels), *image_shape), jnp.float32)

  def loss(images: Array, own: Array) -> Array:
    offset_key, flip_key = jax.random.split(own)
    offsets = jax.random.randint(offset_key, (2,), -shift, shift + 1)
    x = jnp.roll(images, offsets, (1, 2))
    if flip:
      x = jnp.where(jax.random.bernoulli(flip_key), x[:, :, ::-1], x)
    logits = predict(x).astype(jnp.float32)
    error = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    squares = jnp.sum(jnp.square(x), (1, 2, 3))
    # Of an image of zeros the gradient of the norm is 0, not NaN.
    there = squares > 0
    norms = jnp.mean(jnp.where(there, jnp.sqrt(jnp.where(there, squares, 1.0)), 0.0))
    return error + variation_weight * variation(x, variation_power) + norm_weight * norms

  def step(carry: PyTree, index: Array) -> tuple[PyTree, Array]:
    images, state, best, lowest = carry
    value, slope = jax.value_and_grad(loss)(images, jax.random.fold_in(step_key, index))
    best = jnp.where(value < lowest, images, best)
    updates, state = optimizer.update(slope, state)
    images = jnp.clip(optax.apply_updates(images, updates), low, high)
    return (images, state, best, jnp.minimum(lowest, value)), value

  begin = start, optimizer.init(start), start, jnp.float32(jnp.inf)
  (_, _, best, _), history = jax.lax.scan(step, begin, jnp.arange(steps))
  return best, history


def require_recognized(logits: ArrayLike, labels: ArrayLike, share: float = 0.9) -> float:
  """Returns the share of images that a network takes for the classes that they were made for.

  Raises:
    ValueError: if it is below `share`: such images judge nothing. Make them in more steps.

  >>> require_recognized(jnp.eye(3), jnp.arange(3))
  1.0
  """
  found = float(jnp.mean(jnp.argmax(jnp.asarray(logits), -1) == jnp.asarray(labels)))
  if not found >= share:
    raise ValueError(
      f'The network recognizes {found:.0%} of the images that were made for it, expected {share:.0%}: give '
      'them more steps, a larger learning rate or less weight on their smoothness.'
    )
  return found
