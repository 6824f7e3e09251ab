"""Classifiers of tables and cached features, trained in seconds, without the network behind them.

`fit_max_margin` is IbM2: it finds the widest noise under which a linear head still fits a few labeled
features, and trains the head there. `NRSClassifier` is a classifier of scikit-learn for tables.
`filter_and_correct` tells clean labels from wrong ones by their losses.
"""

from typing import TYPE_CHECKING, Any

from jaxlab.classifiers.bisection import (
  bisect_epsilon,
  bisect_epsilon_compiled,
)
from jaxlab.classifiers.loss_mixture import (
  Filtered,
  clean_by_class,
  filter_and_correct,
  fit_gmm_1d,
)
from jaxlab.classifiers.max_margin import (
  MaxMargin,
  Search,
  fit_max_margin,
  margin_head,
  search_epsilon,
)
from jaxlab.classifiers.noisy_head import (
  add_noise,
  feature_std,
  noisy_accuracy,
  perturb_features,
  perturbed_loss,
  train_head,
)

if TYPE_CHECKING:
  from jaxlab.classifiers.random_subspace import NRSClassifier

__all__ = [
  'Filtered',
  'MaxMargin',
  'NRSClassifier',
  'Search',
  'add_noise',
  'bisect_epsilon',
  'bisect_epsilon_compiled',
  'clean_by_class',
  'feature_std',
  'filter_and_correct',
  'fit_gmm_1d',
  'fit_max_margin',
  'margin_head',
  'noisy_accuracy',
  'perturb_features',
  'perturbed_loss',
  'search_epsilon',
  'train_head',
]


def __getattr__(name: str) -> Any:
  """Imports `NRSClassifier` when it is asked for: its base classes are of scikit-learn, slow to load."""
  if name == 'NRSClassifier':
    from jaxlab.classifiers.random_subspace import NRSClassifier

    return NRSClassifier
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
