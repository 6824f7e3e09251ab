"""Evaluation: metrics of arrays, accumulators over batches, and protocols on cached features.

Pure functions that know no model, no config and no files. Accuracies are in [0, 1].
"""

from jaxlab.evaluation.classification import (
  Tally,
  confusion_matrix,
  label_rank,
  per_class_recall,
  tally_compute,
  tally_init,
  tally_update,
  top_k_accuracy,
)
from jaxlab.evaluation.diagnostics import (
  effective_rank,
  feature_std,
  mean_cosine,
)
from jaxlab.evaluation.knn import (
  Neighbors,
  weighted_knn,
)
from jaxlab.evaluation.language import (
  perplexity,
)
from jaxlab.evaluation.linear_probe import (
  Probe,
  linear_probe_lars,
  linear_probe_sgd,
  logistic_probe,
  probe_accuracy,
  probe_logits,
)

__all__ = [
  'Neighbors',
  'Probe',
  'Tally',
  'confusion_matrix',
  'effective_rank',
  'feature_std',
  'label_rank',
  'linear_probe_lars',
  'linear_probe_sgd',
  'logistic_probe',
  'mean_cosine',
  'per_class_recall',
  'perplexity',
  'probe_accuracy',
  'probe_logits',
  'tally_compute',
  'tally_init',
  'tally_update',
  'top_k_accuracy',
  'weighted_knn',
]
