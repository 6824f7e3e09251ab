"""Localization: boxes, and pseudo boxes from features, without an annotation.

Boxes are `(x0, y0, x1, y1)` in pixels, half open. What is done to arrays of fixed shapes is transformable;
connected components are found on the host.
"""

from jaxlab.localization.boxes import (
  best_iou,
  box_area,
  box_iou,
  center_box,
  corloc,
)
from jaxlab.localization.coarse_boxes import (
  box_quality,
  check_boxes,
  coarse_boxes,
  expand_box,
  nms,
)
from jaxlab.localization.objectness import (
  channel_sum,
  components,
  largest_component,
  mask_to_box,
  patch_score_map,
  scda_boxes,
  share_inside,
  threshold_mask,
)

__all__ = [
  'best_iou',
  'box_area',
  'box_iou',
  'box_quality',
  'center_box',
  'channel_sum',
  'check_boxes',
  'coarse_boxes',
  'components',
  'corloc',
  'expand_box',
  'largest_component',
  'mask_to_box',
  'nms',
  'patch_score_map',
  'scda_boxes',
  'share_inside',
  'threshold_mask',
]
