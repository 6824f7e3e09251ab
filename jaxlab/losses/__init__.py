"""Losses: arrays in, a loss out. Pure functions that know no model, no config and no training loop.

Per-example values where a loss decomposes over examples and no method fixes the reduction, a scalar
otherwise; sums and exponentials are taken in at least float32. State (a queue, a center) goes in and
comes out.
"""

from jaxlab.losses.classification import (
  focal_loss,
  label_smoothing_cross_entropy,
  weighted_cross_entropy,
)
from jaxlab.losses.collaborative import (
  hard_categories,
  ncl_loss,
)
from jaxlab.losses.contrastive import (
  info_nce_queue,
  normalize,
  nt_xent,
  queue_init,
  queue_push,
)
from jaxlab.losses.distillation import (
  distillation_loss,
  dive_loss,
  flatten_distribution,
  virtual_example_counts,
)
from jaxlab.losses.language import (
  next_token_cross_entropy,
  next_token_mask,
)
from jaxlab.losses.long_tail import (
  adjust_logits,
  balanced_softmax_loss,
  class_balanced_weights,
  deferred_class_weights,
  ensemble_probabilities,
  gml_loss,
  label_aware_smoothing,
  label_aware_smoothing_loss,
  ldam_loss,
  ldam_margins,
  logit_adjusted_loss,
)
from jaxlab.losses.parametric_contrastive import (
  paco_loss,
)
from jaxlab.losses.reconstruction import (
  mae_loss,
)
from jaxlab.losses.self_supervised import (
  barlow_twins_loss,
  byol_loss,
  cross_correlation,
  dino_center_update,
  dino_loss,
  dino_teacher_temperature,
  negative_cosine_similarity,
  simsiam_loss,
  ssql_loss,
)
from jaxlab.losses.stability import (
  acsr_loss,
  stability_loss,
)

__all__ = [
  'acsr_loss',
  'adjust_logits',
  'balanced_softmax_loss',
  'barlow_twins_loss',
  'byol_loss',
  'class_balanced_weights',
  'cross_correlation',
  'deferred_class_weights',
  'dino_center_update',
  'dino_loss',
  'dino_teacher_temperature',
  'distillation_loss',
  'dive_loss',
  'ensemble_probabilities',
  'flatten_distribution',
  'focal_loss',
  'gml_loss',
  'hard_categories',
  'info_nce_queue',
  'label_aware_smoothing',
  'label_aware_smoothing_loss',
  'label_smoothing_cross_entropy',
  'ldam_loss',
  'ldam_margins',
  'logit_adjusted_loss',
  'mae_loss',
  'ncl_loss',
  'negative_cosine_similarity',
  'next_token_cross_entropy',
  'next_token_mask',
  'normalize',
  'nt_xent',
  'paco_loss',
  'queue_init',
  'queue_push',
  'simsiam_loss',
  'ssql_loss',
  'stability_loss',
  'virtual_example_counts',
  'weighted_cross_entropy',
]
