"""Evaluation: metrics of arrays, accumulators over batches, and protocols on cached features.

Pure functions that know no model, no config and no files. Accuracies are in [0, 1].
"""

from jaxlab.evaluation.calibration import (
  Calibration,
  expected_calibration_error,
)
from jaxlab.evaluation.classification import (
  Tally,
  confusion_matrix,
  label_rank,
  per_class_recall,
  predicted_classes,
  tally_compute,
  tally_init,
  tally_update,
  top_k_accuracy,
)
from jaxlab.evaluation.colinearity import (
  ChannelColinearity,
  channel_colinearity,
  channel_gains,
  colinearity_index,
)
from jaxlab.evaluation.diagnostics import (
  effective_rank,
  feature_std,
  mean_cosine,
  norm_ratios,
)
from jaxlab.evaluation.ensembles import (
  Ensemble,
  ensemble,
)
from jaxlab.evaluation.episodes import (
  episode_metrics,
)
from jaxlab.evaluation.knn import (
  Neighbors,
  weighted_knn,
)
from jaxlab.evaluation.language import (
  aime_correct,
  boxed_answers,
  perplexity,
)
from jaxlab.evaluation.linear_probe import (
  Probe,
  linear_probe_lars,
  linear_probe_sgd,
  logistic_probe,
  multi_label_probe,
  probe_accuracy,
  probe_logits,
)
from jaxlab.evaluation.multi_label import (
  MultiLabelMetrics,
  average_precision,
  mean_average_precision,
  multi_label_metrics,
  shared_label_precision,
)
from jaxlab.evaluation.outliers import (
  DataIndependence,
  OutlierStatistics,
  data_independence,
  outlier_statistics,
)
from jaxlab.evaluation.recalls import (
  confusion_metrics,
  geometric_mean,
  group_recalls,
  harmonic_mean,
  imbalanced_metrics,
  lowest_recall,
  macro_f1,
  recall_metrics,
)
from jaxlab.evaluation.retrieval import (
  RetrievalScores,
  retrieval_scores,
)
from jaxlab.evaluation.values import (
  cumulative_score,
  epsilon_error,
  value_metrics,
)

__all__ = [
  'Calibration',
  'ChannelColinearity',
  'DataIndependence',
  'Ensemble',
  'MultiLabelMetrics',
  'Neighbors',
  'OutlierStatistics',
  'Probe',
  'RetrievalScores',
  'Tally',
  'aime_correct',
  'average_precision',
  'boxed_answers',
  'channel_colinearity',
  'channel_gains',
  'colinearity_index',
  'confusion_matrix',
  'confusion_metrics',
  'cumulative_score',
  'data_independence',
  'effective_rank',
  'ensemble',
  'episode_metrics',
  'epsilon_error',
  'expected_calibration_error',
  'feature_std',
  'geometric_mean',
  'group_recalls',
  'harmonic_mean',
  'imbalanced_metrics',
  'label_rank',
  'linear_probe_lars',
  'linear_probe_sgd',
  'logistic_probe',
  'lowest_recall',
  'macro_f1',
  'mean_average_precision',
  'mean_cosine',
  'multi_label_metrics',
  'multi_label_probe',
  'norm_ratios',
  'outlier_statistics',
  'per_class_recall',
  'perplexity',
  'predicted_classes',
  'probe_accuracy',
  'probe_logits',
  'recall_metrics',
  'retrieval_scores',
  'shared_label_precision',
  'tally_compute',
  'tally_init',
  'tally_update',
  'top_k_accuracy',
  'value_metrics',
  'weighted_knn',
]
