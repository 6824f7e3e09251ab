"""Where a network's features see an object: maps of activations, masks, boxes.

SCDA (Wei et al. 2017, arXiv 1604.04994): the features of a convolutional map are summed over channels; what
lies above the mean, in the largest connected component, is the object. A network as it was drawn localizes
objects this way (Cao & Wu 2022, arXiv 2106.09259). Maps are `[..., rows, columns]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike

from jaxlab.localization.boxes import box_area


def channel_sum(features: ArrayLike) -> jax.Array:
  """Returns the sum over channels of features `[..., rows, columns, channels]`, in at least float32."""
  features = jnp.asarray(features)
  return jnp.sum(features, axis=-1, dtype=jnp.promote_types(features.dtype, jnp.float32))


def threshold_mask(score: ArrayLike, factor: float = 1.0) -> jax.Array:
  """Returns where a map `[..., rows, columns]` is above `factor` times its mean, bool; strictly above.

  Raises:
    ValueError: for NaN, where it is concrete; under `jit` the mask is empty there.
  """
  score = jnp.asarray(score)
  if not isinstance(score, jax.core.Tracer) and bool(jnp.any(jnp.isnan(score))):
    raise ValueError('the map holds NaN: look at the features that it is made of.')
  # From its first cell on, a constant map has exactly its value as mean, and no cell above it.
  first = score[..., :1, :1]
  return score > factor * (first + jnp.mean(score - first, axis=(-2, -1), keepdims=True))


def components(mask: ArrayLike, connectivity: Literal[4, 8] = 8) -> tuple[np.ndarray, int]:
  """Returns the connected components of a mask, numbered from 1 in the order they are met, and their number.

  Args:
    mask: bool `[rows, columns]`; rows are read one after the other.
    connectivity: 8: cells that touch at a corner belong together; 4: at a side alone.

  Raises:
    ValueError: for another connectivity or rank.
  """
  from scipy import ndimage

  mask = np.asarray(mask)
  if connectivity not in (4, 8) or mask.ndim != 2:
    raise ValueError(
      f'connectivity={connectivity}, mask of shape {mask.shape}: expected 4 or 8, and [rows, columns].'
    )
  structure = ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2)
  return ndimage.label(mask, structure)


def largest_component(mask: ArrayLike, connectivity: Literal[4, 8] = 8) -> np.ndarray:
  """Returns the largest connected component of a mask, bool `[rows, columns]`; of equals the first met.

  Args:
    mask: bool `[rows, columns]`; an empty one stays empty.
    connectivity: see `components`.
  """
  labels, count = components(mask, connectivity)
  if not count:
    return np.zeros(labels.shape, bool)
  return labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])


def mask_to_box(mask: ArrayLike, size: int | Sequence[int]) -> np.ndarray:
  """Returns the tight box of a mask that is enlarged to an image, int64 `[4]`.

  Pixel `i` of `S` belongs to the nearest of `h` cells, `floor((i + 0.5) h / S)`: where `h` divides `S` each
  cell becomes a square. Without a cell in the mask it is the whole image.

  Args:
    mask: bool `[rows, columns]`.
    size: side, or height and width, of the image.

  >>> print(mask_to_box([[False, True], [False, False]], 8))
  [4 0 8 4]
  """
  mask = np.asarray(mask, bool)
  height, width = (size, size) if isinstance(size, int) else size
  if not mask.any():
    return np.array([0, 0, width, height])
  edges = []
  for axis, side in ((1, width), (0, height)):
    cells = np.floor((np.arange(side) + 0.5) * mask.shape[axis] / side).astype(int)
    pixels = np.flatnonzero(mask.any(1 - axis)[cells])
    if not pixels.size:
      raise ValueError(f'a map of {mask.shape} cells is finer than the image of {height}x{width}.')
    edges.append((pixels[0], pixels[-1] + 1))
  (x0, x1), (y0, y1) = edges
  return np.array([x0, y0, x1, y1])


def scda_boxes(score: ArrayLike, size: int | Sequence[int], factor: float = 1.0) -> np.ndarray:
  """Returns the box of each image's object, int64 `[images, 4]`.

  `mask_to_box` of `largest_component` of `threshold_mask`.

  Args:
    score: `[images, rows, columns]`, see `channel_sum`.
    size: side, or height and width, of the images.
    factor: see `threshold_mask`.
  """
  masks = np.asarray(threshold_mask(score, factor))
  return np.stack([mask_to_box(largest_component(mask), size) for mask in masks])


def patch_score_map(
  features: ArrayLike, grid: int = 4, pooling: Literal['max', 'average'] = 'max'
) -> jax.Array:
  """Returns scores of a grid of cells, features pooled and summed over channels, `[batch, grid, grid]`.

  Args:
    features: `[batch, rows, columns, channels]`.
    grid: cells a side.
    pooling: 'max': 2x2, stride 2, with -inf around, which makes a grid of 4 of 7x7 or 6x6 features;
      'average': over the blocks of features that make a cell.

  Raises:
    ValueError: if the pooling does not make such a grid of these features.
  """
  features = jnp.asarray(features)
  rows, columns = features.shape[1:3]
  if pooling == 'max' and {side // 2 + 1 for side in (rows, columns)} == {grid}:
    return channel_sum(nn.max_pool(features, (2, 2), (2, 2), ((1, 1), (1, 1))))
  if pooling == 'average' and not rows % grid and not columns % grid:
    score = channel_sum(features).reshape(len(features), grid, rows // grid, grid, columns // grid)
    return jnp.mean(score, axis=(2, 4))
  raise ValueError(
    f'features of {rows}x{columns} positions make no grid of {grid} by pooling={pooling!r}: it needs '
    + (f'{2 * grid - 2} or {2 * grid - 1}' if pooling == 'max' else f'a multiple of {grid}')
    + ' a side.'
  )


def share_inside(boxes: ArrayLike, mask: ArrayLike, size: int | Sequence[int]) -> jax.Array:
  """Returns the share of each box's area that lies within the cells of a mask, float `[images]`.

  Args:
    boxes: `[images, 4]`, within the image and not empty.
    mask: bool `[images, rows, columns]`.
    size: side, or height and width, of the images.
  """
  boxes, mask = jnp.asarray(boxes, jnp.float32), jnp.asarray(mask)
  height, width = (size, size) if isinstance(size, int) else size
  overlaps = []
  for first, last, side, cells in (
    (boxes[:, 1], boxes[:, 3], height, mask.shape[1]),
    (boxes[:, 0], boxes[:, 2], width, mask.shape[2]),
  ):
    edges = jnp.linspace(0, side, cells + 1)
    inside = jnp.minimum(last[:, None], edges[1:]) - jnp.maximum(first[:, None], edges[:-1])
    overlaps.append(jnp.maximum(inside, 0))
  return jnp.einsum('nr,nc,nrc->n', *overlaps, mask.astype(jnp.float32)) / box_area(boxes)
