"""Backgrounds of other images: cells of a grid that hold an object stay, the others are another image's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def split_cells(score: ArrayLike, num_foreground: int | None = None) -> tuple[jax.Array, jax.Array]:
  """Returns the cells of the highest scores and the others, each in descending order of their scores.

  Equal scores stay in raster order.

  Args:
    score: `[..., grid, grid]`.
    num_foreground: cells of the first kind; None: half of them.

  Returns:
    int32 `[..., num_foreground]` and `[..., grid * grid - num_foreground]`: numbers of cells in raster order.

  Raises:
    ValueError: if a grid has no such half or number.
  """
  score = jnp.asarray(score)
  cells = score.shape[-1] * score.shape[-2]
  count = _num_foreground(cells, num_foreground)
  order = jnp.argsort(
    score.reshape(*score.shape[:-2], cells), axis=-1, stable=True, descending=True
  )
  order = order.astype(jnp.int32)
  return order[..., :count], order[..., count:]


def merge_background(
  image: ArrayLike, other: ArrayLike, foreground: ArrayLike, background: ArrayLike, order: ArrayLike
) -> jax.Array:
  """Returns an image whose background is made of cells of another one.

  Its foreground cells stay in place. The others, in raster order, show the background cells of the other
  image: these in raster order, permuted by `order`.

  Args:
    image: `[height, width, channels]`, of any dtype.
    other: of the same shape and dtype.
    foreground: int `[kept]`, cells of `image`, see `split_cells`.
    background: int `[filled]`, cells of `other`.
    order: a permutation of `filled` numbers.

  Raises:
    ValueError: if images differ, if there are not as many background cells as the image has besides its
      foreground, or if the cells do not divide the image.

  References:
    Cao & Wu, A Random CNN Sees Objects, AAAI 2022 (https://arxiv.org/abs/2106.09259).
  """
  image, other = jnp.asarray(image), jnp.asarray(other)
  foreground, background = jnp.asarray(foreground), jnp.asarray(background)
  cells = len(foreground) + len(background)
  grid = round(cells**0.5)
  if grid * grid != cells:
    raise ValueError(
      f'{len(foreground)} foreground and {len(background)} background cells make no square grid.'
    )
  if image.ndim != 3 or image.shape != other.shape or image.dtype != other.dtype:
    raise ValueError(
      f'images must be [height, width, channels] of one shape and dtype, got {image.dtype}{image.shape} '
      f'and {other.dtype}{other.shape}: resize one.'
    )
  if image.shape[0] % grid or image.shape[1] % grid:
    raise ValueError(
      f'a grid of {grid}x{grid} does not divide an image of {image.shape[0]}x{image.shape[1]}: resize it.'
    )
  kept = jnp.zeros(cells, bool).at[foreground].set(True)
  free = jnp.argsort(kept, stable=True)[: len(background)]
  taken = jnp.sort(background)[jnp.asarray(order)]
  merged = _cells(image, grid).at[free].set(_cells(other, grid)[taken])
  height, width, channels = image.shape
  merged = merged.reshape(grid, grid, height // grid, width // grid, channels)
  return merged.transpose(0, 2, 1, 3, 4).reshape(image.shape)


def change_backgrounds(
  keys: jax.Array,
  images: ArrayLike,
  scores: ArrayLike | None,
  probability: float,
  *,
  grid: int = 4,
  num_foreground: int | None = None,
) -> jax.Array:
  """Returns a batch in which an image has, with a probability, the background of another one of the batch.

  The other image is drawn uniformly and may be the image itself; its background cells are permuted. All
  images of a batch have one size, so that none is resized.

  Args:
    keys: one typed key an image, e.g. from `example_keys`.
    images: `[batch, height, width, channels]`.
    scores: `[batch, grid, grid]`, high where an object is (`localization.patch_score_map`); None: cells are
      drawn uniformly in both images, the control.
    probability: of a change, in [0, 1]; a Python number.
    grid: cells a side, without scores.
    num_foreground: cells that stay; None: half of them.

  Raises:
    ValueError: for another probability, or what `merge_background` and `split_cells` refuse.
  """
  images = jnp.asarray(images)
  if not 0 <= probability <= 1:
    raise ValueError(f'probability={probability}: expected a number in [0, 1].')
  if scores is not None:
    scores = jnp.asarray(scores)
    if scores.shape != (len(images), *scores.shape[1:2] * 2):
      raise ValueError(
        f'scores have shape {scores.shape}, expected [{len(images)}, grid, grid], a map an image.'
      )
    grid = scores.shape[-1]
  count = _num_foreground(grid * grid, num_foreground)

  def change(key: jax.Array, image: jax.Array, own: jax.Array | None) -> jax.Array:
    changes, partner, order, kept, taken = jax.random.split(key, 5)
    index = jax.random.randint(partner, (), 0, len(images))
    if own is None:
      own, others = (jax.random.uniform(k, (grid, grid)) for k in (kept, taken))
    else:
      others = scores[index]
    foreground, _ = split_cells(own, count)
    _, background = split_cells(others, count)
    drawn = jax.random.permutation(order, grid * grid - count)
    merged = merge_background(image, images[index], foreground, background, drawn)
    return jnp.where(jax.random.bernoulli(changes, probability), merged, image)

  return jax.vmap(change, in_axes=(0, 0, None if scores is None else 0))(keys, images, scores)


def _num_foreground(cells: int, count: int | None) -> int:
  """Returns the number of cells that stay.

  Raises:
    ValueError: for half of an odd number, or a number that leaves no cell on one side.
  """
  if count is None and cells % 2:
    raise ValueError(f'{cells} cells have no half: give num_foreground.')
  count = cells // 2 if count is None else count
  if not 0 < count < cells:
    raise ValueError(f'num_foreground={count}: expected 1 to {cells - 1} of {cells} cells.')
  return count


def _cells(image: jax.Array, grid: int) -> jax.Array:
  """Returns the cells of an image in raster order, `[grid * grid, height / grid, width / grid, channels]`."""
  height, width, channels = image.shape
  cells = image.reshape(grid, height // grid, grid, width // grid, channels)
  return cells.transpose(0, 2, 1, 3, 4).reshape(
    grid * grid, height // grid, width // grid, channels
  )
