"""Boxes `(x0, y0, x1, y1)` in pixels, half open: they cover columns `x0 .. x1 - 1`, rows `y0 .. y1 - 1`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def box_area(boxes: ArrayLike) -> jax.Array:
  """Returns the areas `[...]` of boxes `[..., 4]`; 0 where a box ends before it begins."""
  boxes = jnp.asarray(boxes)
  return jnp.prod(jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0), axis=-1)


def box_iou(a: ArrayLike, b: ArrayLike) -> jax.Array:
  """Returns the intersection over the union of boxes, float `[...]`, without the "+ 1" of some codes.

  Boxes that touch at an edge do not intersect; with an empty box it is 0.

  Args:
    a: `[..., 4]`.
    b: likewise; the leading axes broadcast.

  >>> print(box_iou([0, 0, 4, 4], [0, 0, 4, 2]))
  0.5
  """
  a, b = (_float(boxes) for boxes in (a, b))
  shared = jnp.concatenate(
    [jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])], axis=-1
  )
  intersection = box_area(shared)
  union = box_area(a) + box_area(b) - intersection
  return jnp.where(union > 0, intersection / jnp.where(union > 0, union, 1), 0)


def best_iou(predicted: ArrayLike, truth: ArrayLike, valid: ArrayLike | None = None) -> jax.Array:
  """Returns the largest intersection over union of each box with one of its image's true boxes.

  Args:
    predicted: `[..., 4]`, one box an image.
    truth: `[..., count, 4]`.
    valid: bool `[..., count]`, which rows of `truth` are boxes; None: all.

  Returns:
    Float `[...]`; 0 where an image has no true box.

  Raises:
    ValueError: for a true box without an area, where it is concrete.
  """
  predicted, truth = jnp.asarray(predicted), jnp.asarray(truth)
  valid = jnp.ones(truth.shape[:-1], bool) if valid is None else jnp.asarray(valid)
  if not any(isinstance(array, jax.core.Tracer) for array in (truth, valid)):
    empty = np.argwhere(np.asarray(valid) & ~np.all(truth[..., 2:] > truth[..., :2], axis=-1))
    if len(empty):
      where = tuple(empty[0].tolist())
      raise ValueError(
        f'{len(empty)} true boxes have no area, the first at {where}: {truth[where]}.'
      )
  found = jnp.where(valid, box_iou(predicted[..., None, :], truth), 0)
  return jnp.max(found, axis=-1, initial=0)


def corloc(iou: ArrayLike, classes: ArrayLike | None = None, threshold: float = 0.5) -> float:
  """Returns the share of images whose box is correct, the mean over classes of each class's.

  Args:
    iou: float `[images]`, see `best_iou`.
    classes: integers `[images]`; None: one class.
    threshold: an image is correct above it.

  Raises:
    ValueError: without an image, or for NaN.

  >>> corloc([0.6, 0.5, 0.9, 0.8], [0, 0, 1, 1])
  0.75
  """
  iou = np.asarray(iou, np.float64)
  if not iou.size or np.isnan(iou).any():
    raise ValueError(f'iou: expected numbers, at least one; got {iou}.')
  classes = np.zeros(iou.shape, int) if classes is None else np.asarray(classes)
  shares = [np.mean(iou[classes == own] > threshold) for own in np.unique(classes)]
  return float(np.mean(shares))


def center_box(size: Sequence[int], share: float = 0.5) -> np.ndarray:
  """Returns the box in the middle that covers a share of the area, float64 `[4]`.

  Args:
    size: height and width of the image.
    share: of its area, in (0, 1].

  Raises:
    ValueError: for another share.
  """
  if not 0 < share <= 1:
    raise ValueError(f'share is {share}, expected one in (0, 1].')
  height, width = size
  inner = np.sqrt(share) * np.array([width, height])
  first = (np.array([width, height]) - inner) / 2
  return np.concatenate([first, first + inner])


def _float(boxes: ArrayLike) -> jax.Array:
  boxes = jnp.asarray(boxes)
  if boxes.shape[-1:] != (4,):
    raise ValueError(f'boxes have shape {boxes.shape}, expected [..., 4].')
  return boxes.astype(jnp.promote_types(boxes.dtype, jnp.float32))
