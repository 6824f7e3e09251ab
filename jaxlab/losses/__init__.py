"""Losses: arrays in, a loss out. Pure functions that know no model, no config and no training loop.

Two rules hold for all losses on logits, next to that of `jaxlab` on values that are not finite:

- A logit of -inf masks its class: probability 0, no share in a smoothed or spread target, gradient 0; value
  and gradient are those of the loss without the class. The loss of a label (or of a target with positive
  probability) that is masked itself is infinite; only `gml_loss` has a floor under the probability.
- A label outside `[0, num_classes)` raises ValueError where it is concrete. Under `jit`, where it cannot,
  the value of its example (and any mean over it) and the gradient are NaN. There is no ignored label: use a
  mask or weights.

Per-example values where a loss decomposes over examples and no method fixes the reduction, a scalar
otherwise; sums and exponentials are taken in at least float32. State (a queue, a center) goes in and
comes out.
"""

from jaxlab.losses.classification import (
  cross_entropy,
  focal_loss,
  label_smoothing_cross_entropy,
  multi_label_bce,
  sigmoid_focal_loss,
  weighted_cross_entropy,
)
from jaxlab.losses.colinearity import (
  colinearity_loss,
)
from jaxlab.losses.collaborative import (
  hard_categories,
  ncl_loss,
)
from jaxlab.losses.confidence_penalties import (
  max_entropy_loss,
  pairwise_confusion,
)
from jaxlab.losses.contrastive import (
  info_nce_queue,
  multi_view_contrastive_loss,
  normalize,
  nt_xent,
  queue_init,
  queue_push,
  supervised_contrastive_loss,
)
from jaxlab.losses.distillation import (
  distillation_loss,
  dive_loss,
  flatten_distribution,
  mixup_distillation_loss,
  virtual_example_counts,
)
from jaxlab.losses.feature_distillation import (
  feature_distillation_loss,
  mimic_loss,
  qfd_loss,
)
from jaxlab.losses.hashing import (
  draw_hyperplanes,
  hash_bits,
  hash_values,
  hyperplane_bias,
  lsh_l2_loss,
  lsh_loss,
  mean_where_right,
  merge_linear,
  stored_lsh_loss,
)
from jaxlab.losses.label_correction import (
  PencilTerms,
  d2_loss,
  initial_label_logits,
  label_distribution_loss,
  label_refinement_loss,
  pencil_loss,
  pencil_terms,
)
from jaxlab.losses.label_distributions import (
  DistributionLoss,
  dex_loss,
  dldl_v2_loss,
  from_unit_range,
  gaussian_label_distribution,
  label_expectation,
  nearest_label,
  rank_code,
  rank_predict,
  ranking_loss,
  regression_loss,
  soft_rank_code,
  to_unit_range,
)
from jaxlab.losses.language import (
  next_token_cross_entropy,
  next_token_mask,
  token_classifier_loss,
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
from jaxlab.losses.memory_bank import (
  BankLoss,
  bank_init,
  bank_update_ema,
  bank_update_gradient,
  memory_bank_loss,
  sample_columns,
  sqrt_kl,
)
from jaxlab.losses.outliers import (
  tweo_loss,
)
from jaxlab.losses.parametric_contrastive import (
  paco_loss,
)
from jaxlab.losses.principal_components import (
  PrincipalComponents,
  coordinate_system,
  fit_principal_components,
  num_components,
  pca_mimicking_loss,
)
from jaxlab.losses.pseudo_positives import (
  multi_label_queue_loss,
  neighbor_queue_loss,
  queues_push,
  top_k_pseudo_labels,
)
from jaxlab.losses.reconstruction import (
  mae_loss,
)
from jaxlab.losses.sample_selection import (
  PairLoss,
  Selection,
  co_teaching_loss,
  decoupling_loss,
  peer_learning_loss,
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
from jaxlab.losses.spectral import (
  orthogonality_loss,
  top_singular_loss,
)
from jaxlab.losses.stability import (
  acsr_loss,
  stability_loss,
)

__all__ = [
  'BankLoss',
  'DistributionLoss',
  'PairLoss',
  'PencilTerms',
  'PrincipalComponents',
  'Selection',
  'acsr_loss',
  'adjust_logits',
  'balanced_softmax_loss',
  'bank_init',
  'bank_update_ema',
  'bank_update_gradient',
  'barlow_twins_loss',
  'byol_loss',
  'class_balanced_weights',
  'co_teaching_loss',
  'colinearity_loss',
  'coordinate_system',
  'cross_correlation',
  'cross_entropy',
  'd2_loss',
  'decoupling_loss',
  'deferred_class_weights',
  'dex_loss',
  'dino_center_update',
  'dino_loss',
  'dino_teacher_temperature',
  'distillation_loss',
  'dive_loss',
  'dldl_v2_loss',
  'draw_hyperplanes',
  'ensemble_probabilities',
  'feature_distillation_loss',
  'fit_principal_components',
  'flatten_distribution',
  'focal_loss',
  'from_unit_range',
  'gaussian_label_distribution',
  'gml_loss',
  'hard_categories',
  'hash_bits',
  'hash_values',
  'hyperplane_bias',
  'info_nce_queue',
  'initial_label_logits',
  'label_aware_smoothing',
  'label_aware_smoothing_loss',
  'label_distribution_loss',
  'label_expectation',
  'label_refinement_loss',
  'label_smoothing_cross_entropy',
  'ldam_loss',
  'ldam_margins',
  'logit_adjusted_loss',
  'lsh_l2_loss',
  'lsh_loss',
  'mae_loss',
  'max_entropy_loss',
  'mean_where_right',
  'memory_bank_loss',
  'merge_linear',
  'mimic_loss',
  'mixup_distillation_loss',
  'multi_label_bce',
  'multi_label_queue_loss',
  'multi_view_contrastive_loss',
  'ncl_loss',
  'nearest_label',
  'negative_cosine_similarity',
  'neighbor_queue_loss',
  'next_token_cross_entropy',
  'next_token_mask',
  'normalize',
  'nt_xent',
  'num_components',
  'orthogonality_loss',
  'paco_loss',
  'pairwise_confusion',
  'pca_mimicking_loss',
  'peer_learning_loss',
  'pencil_loss',
  'pencil_terms',
  'qfd_loss',
  'queue_init',
  'queue_push',
  'queues_push',
  'rank_code',
  'rank_predict',
  'ranking_loss',
  'regression_loss',
  'sample_columns',
  'sigmoid_focal_loss',
  'simsiam_loss',
  'soft_rank_code',
  'sqrt_kl',
  'ssql_loss',
  'stability_loss',
  'stored_lsh_loss',
  'supervised_contrastive_loss',
  'to_unit_range',
  'token_classifier_loss',
  'top_k_pseudo_labels',
  'top_singular_loss',
  'tweo_loss',
  'virtual_example_counts',
  'weighted_cross_entropy',
]
