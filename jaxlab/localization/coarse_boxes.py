"""Several generous boxes an image from a map of objectness, on the host.

The pipeline, boxes first and any self-supervised method on the crops, is that of Zhu et al. 2023 (arXiv
2306.04244); the rule by which boxes are made is not published where it could be read: this one is inferred.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxlab.localization.objectness import components, mask_to_box


def coarse_boxes(
  score: ArrayLike,
  size: int | Sequence[int],
  *,
  factor: float = 1.0,
  least: float = 0.02,
  expand: float = 1.4,
  big: float = 0.6,
  rounds: int = 3,
  max_boxes: int = 5,
  max_iou: float = 0.5,
  min_side: float = 0.2,
  max_aspect: float = 2.0,
  include_full: bool = False,
) -> np.ndarray:
  """Returns the boxes of the objects of one image, int64 `[boxes, 4]`, the best first [inferred].

  The map is brought to [0, 1]. Its connected components (8 neighbors) above `factor` times the mean
  are objects. Too small ones are dropped; one that is too large is split, by raising the factor by
  0.2 inside of it until it falls apart or is small enough. A component's score is the mean of the
  map inside times the root of its cells. Its tight box is enlarged, by `expand` and then to the
  aspect; of boxes that overlap the best stays, and what stays is enlarged to the least side. Equal
  scores are ordered by y, then x. If nothing is left, it is the whole image. Whatever enlarges a box
  does so about its center and is clipped to the image (`expand_box`): at the border boxes may be shorter
  than the least side, and longer than the aspect.

  Args:
    score: `[rows, columns]`, see `channel_sum`.
    size: side, or height and width, of the image.
    factor: of the mean, above which a cell belongs to an object [inferred].
    least: share of the cells that a component has at least [inferred].
    expand: factor on both sides of a box, about its center; 1: tight [inferred].
    big: share of the cells above which a component is split [inferred].
    rounds: in which it is [inferred].
    max_boxes: that are kept, besides the whole image [inferred].
    max_iou: of a kept box with a better one [inferred].
    min_side: of a box before it is clipped, as a share of the image's short side [inferred].
    max_aspect: of the long to the short side, likewise [inferred].
    include_full: adds the whole image as the last box, unless it is one already [inferred].

  Raises:
    ValueError: for values out of their range, or a map that is not finite.
  """
  score = np.asarray(score, np.float64)
  height, width = (size, size) if isinstance(size, int) else size
  for name, value, low in (
    *(('factor', factor, None), ('max_aspect', max_aspect, 1), ('expand', expand, 1)),
    *(('max_boxes', max_boxes, 1), ('max_iou', max_iou, None), ('least', least, None)),
    *(('big', big, None), ('min_side', min_side, None), ('rounds', rounds, 0)),
  ):
    if value < low if low is not None else value <= 0:
      wanted = f'at least {low}' if low is not None else 'a positive number'
      raise ValueError(f'{name}={value}: expected {wanted}.')
  if score.ndim != 2 or not np.isfinite(score).all():
    raise ValueError(f'score of shape {score.shape}: expected finite values [rows, columns].')
  spread = score.max() - score.min()
  score = (score - score.min()) / (spread if spread > 0 else 1)
  found = []
  for mask in _parts(score > factor * score.mean(), least):
    if mask.mean() > big:
      found += _split(score, mask, factor, least, big, rounds)
    else:
      found.append(mask)
  whole = np.array([[0, 0, width, height]])
  if not found:
    return whole
  values = np.array([score[mask].mean() * np.sqrt(mask.sum()) for mask in found])
  boxes = np.array([
    expand_box(mask_to_box(mask, (height, width)), expand, (height, width), max_aspect)
    for mask in found
  ])  # fmt: skip
  side = min_side * min(height, width)
  kept = boxes[nms(boxes, values, max_iou)[:max_boxes]]
  grown = np.array([expand_box(box, 1, (height, width), min_side=side) for box in kept])
  if include_full and not np.any(np.all(grown == whole, axis=1)):
    return np.concatenate([grown, whole])
  return grown


def expand_box(
  box: ArrayLike,
  factor: float,
  size: Sequence[int],
  max_aspect: float = np.inf,
  min_side: float = 0.0,
) -> np.ndarray:
  """Returns a box enlarged about its center and then clipped to the image, int64 `[4]`; edges round outwards.

  All sizes are of the box before it is clipped: what would lie beyond the border is cut off and not added at
  the other side, so that there sides are shorter than `min_side`, and the aspect may exceed `max_aspect`.

  Args:
    box: `[4]`, with an area, within the image.
    factor: of both sides, at least 1.
    size: height and width of the image.
    max_aspect: the short side is extended until the long one is at most as many times as long.
    min_side: shorter sides are extended to as many pixels.

  Raises:
    ValueError: for a smaller factor, or a box that has no area or reaches out of the image.

  >>> print(expand_box([4, 4, 8, 6], 1.5, (16, 16)))
  [3 3 9 7]
  >>> print(expand_box([0, 0, 4, 4], 1, (100, 100), min_side=20))
  [ 0  0 12 12]
  """
  height, width = size
  x0, y0, x1, y1 = box = np.asarray(box)
  if factor < 1:
    raise ValueError(f'factor={factor}: expected at least 1.')
  check_boxes(box[None], size)
  sides = np.array([x1 - x0, y1 - y0]) * factor
  sides = np.maximum(np.maximum(sides, sides.max() / max_aspect), min_side)
  center = np.array([x0 + x1, y0 + y1]) / 2
  # Sums of what binary fractions cannot hold must not move an edge by a pixel.
  first = np.floor(np.maximum(center - sides / 2, 0) + 1e-6)
  last = np.ceil(np.minimum(center + sides / 2, [width, height]) - 1e-6)
  return np.concatenate([first, last]).astype(np.int64)


def nms(boxes: ArrayLike, scores: ArrayLike, max_iou: float) -> np.ndarray:
  """Returns which boxes stay when each takes away the worse ones that overlap it more, the best first.

  Args:
    boxes: `[boxes, 4]`.
    scores: `[boxes]`; equal ones are ordered by y, then x, of the first corner.
    max_iou: overlap of two that stay.
  """
  boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
  order = np.lexsort((boxes[:, 0], boxes[:, 1], -np.asarray(scores)))
  kept: list[int] = []
  for index in order:
    if not kept or _iou(boxes[index], boxes[kept]).max() <= max_iou:
      kept.append(int(index))
  return np.array(kept, np.int64)


def box_quality(
  boxes: Sequence[ArrayLike], truth: Sequence[ArrayLike], thresholds: Sequence[float] = (0.3, 0.5)
) -> dict[str, float]:
  """Returns how well boxes find the objects of some images.

  `recall_<threshold>`: share of true boxes that overlap some box by more; `coverage`: share of their area
  that lies in some box, the mean over true boxes; `objects`: true boxes whose center lies in a box, a box;
  `boxes`: an image.

  Args:
    boxes: `[boxes, 4]` of each image, integers.
    truth: likewise, the true ones.
    thresholds: of the recalls.
  """
  best, covered, objects = [], [], []
  for own, true in zip(boxes, truth, strict=True):
    own, true = (np.asarray(each).reshape(-1, 4) for each in (own, true))
    seen = np.zeros(tuple(true[:, [3, 2]].max(0).astype(int)) if len(true) else (0, 0), bool)
    for x0, y0, x1, y1 in own.astype(int):
      seen[y0:y1, x0:x1] = True
    for box in true:
      x0, y0, x1, y1 = box.astype(int)
      best.append(_iou(box, own).max(initial=0))
      covered.append(seen[y0:y1, x0:x1].mean())
    centers = (true[:, None, :2] + true[:, None, 2:]) / 2
    objects += list(np.sum(np.all((centers >= own[:, :2]) & (centers < own[:, 2:]), -1), 0))
  if not best or not objects:
    raise ValueError('box_quality needs at least one box and one true box.')
  return {
    **{f'recall_{threshold:g}': float(np.mean(np.array(best) > threshold)) for threshold in thresholds},
    'coverage': float(np.mean(covered)),
    'objects': float(np.mean(objects)),
    'boxes': float(np.mean([len(own) for own in boxes])),
  }  # fmt: skip


def check_boxes(boxes: ArrayLike, size: Sequence[int]) -> None:
  """Raises ValueError, naming the first, if a box has no area or reaches out of the image.

  Args:
    boxes: `[boxes, 4]`.
    size: height and width of the image.
  """
  boxes, (height, width) = np.asarray(boxes), size
  right = np.all(boxes[:, :2] >= 0, 1) & np.all(boxes[:, 2:] > boxes[:, :2], 1)
  right &= (boxes[:, 2] <= width) & (boxes[:, 3] <= height)
  if not right.all():
    wrong = int(np.argmin(right))
    raise ValueError(
      f'box {wrong} is {boxes[wrong].tolist()}: expected x0 < x1 and y0 < y1 within {height}x{width} pixels.'
    )


def _parts(mask: np.ndarray, least: float) -> list[np.ndarray]:
  """Returns the components of a mask that are large enough."""
  labels, count = components(mask)
  found = [labels == index + 1 for index in range(count)]
  return [part for part in found if part.mean() >= least]


def _split(
  score: np.ndarray, mask: np.ndarray, factor: float, least: float, big: float, rounds: int
) -> list[np.ndarray]:
  """Returns the parts of a component that is too large, or itself if nothing splits it."""
  for step in range(1, rounds + 1):
    parts = _parts(mask & (score > (factor + 0.2 * step) * score.mean()), least)
    if len(parts) > 1 or (parts and parts[0].mean() <= big):
      return parts
  return [mask]


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Returns the overlap of a box with others, `[others]`."""
  sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
  shared = np.prod(np.maximum(sides, 0), axis=1)
  union = np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], axis=1) - shared
  return shared / union
