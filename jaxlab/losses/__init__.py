"""Losses: arrays in, a loss out. Pure functions that know no model, no config and no training loop.

Per-example values where a loss decomposes over examples and no method fixes the reduction, a scalar
otherwise; sums and exponentials are taken in at least float32. State (a queue, a center) goes in and
comes out.
"""

from jaxlab.losses.contrastive import (
  info_nce_queue,
  normalize,
  nt_xent,
  queue_init,
  queue_push,
)
from jaxlab.losses.language import (
  next_token_cross_entropy,
  next_token_mask,
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

__all__ = [
  'barlow_twins_loss',
  'byol_loss',
  'cross_correlation',
  'dino_center_update',
  'dino_loss',
  'dino_teacher_temperature',
  'info_nce_queue',
  'mae_loss',
  'negative_cosine_similarity',
  'next_token_cross_entropy',
  'next_token_mask',
  'normalize',
  'nt_xent',
  'queue_init',
  'queue_push',
  'simsiam_loss',
  'ssql_loss',
]
