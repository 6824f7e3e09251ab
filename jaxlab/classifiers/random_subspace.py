"""Neural random subspaces as a classifier of scikit-learn: `fit`, `predict`, `predict_proba`, `score`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, check_X_y

from jaxlab.data.pipeline import make_loader
from jaxlab.models.random_subspace import nrs_net
from jaxlab.training.step import Initial, LossState, Out, make_program

Array = jax.Array
PyTree = Any


class NRSClassifier(ClassifierMixin, BaseEstimator):
  """A network with an NRS layer (`models.nrs_net`) over the rows of a table, trained by Adam.

  Works in scikit-learn's pipelines, searches and cross-validation. Features are taken as they are: bring them
  to about [-1, 1] or standardize them before.

  Args:
    patch: side of a patch, 3 or 5: a subset has its square of features.
    n_mul: subsets for each feature; the official settings have `dim * n_mul` between 1000 and 5000.
    n_per: subsets that a convolution combines.
    hidden: units of the dense layers behind.
    learning_rate: of Adam.
    epochs: passes over the records.
    batch_size: records of a step, at most as many as there are; what is left at the end of an epoch is not
      used in it.
    random_state: integer, of index, parameters and order.

  Attributes:
    classes_: labels, sorted.
    n_features_in_: columns of the table.
    variables_: of the network.

  Raises:
    ValueError: from `fit` and `predict`, for features that are no finite matrix or of another width, labels
      of fewer than two classes, and settings that cannot be.

  >>> from sklearn.datasets import load_iris
  >>> x, y = load_iris(return_X_y=True)
  >>> model = NRSClassifier(n_mul=4, hidden=(16,), epochs=1).fit(x / 4, y)
  >>> model.predict_proba(x[:2] / 4).shape
  (2, 3)
  """

  def __init__(
    self,
    *,
    patch: int = 3,
    n_mul: int = 10,
    n_per: int = 1,
    hidden: tuple[int, ...] = (128, 128),
    learning_rate: float = 1e-3,
    epochs: int = 25,
    batch_size: int = 64,
    random_state: int = 0,
  ):
    self.patch = patch
    self.n_mul = n_mul
    self.n_per = n_per
    self.hidden = hidden
    self.learning_rate = learning_rate
    self.epochs = epochs
    self.batch_size = batch_size
    self.random_state = random_state

  def fit(self, X: ArrayLike, y: ArrayLike) -> NRSClassifier:  # noqa: N803
    """Trains a new network on features `[records, dim]` and labels `[records]` of any kind."""
    x, y = check_X_y(X, y, dtype=np.float32)
    check_classification_targets(y)
    self.classes_, labels = np.unique(y, return_inverse=True)
    self.n_features_in_ = x.shape[1]
    if len(self.classes_) < 2:
      raise ValueError(f'y holds the one class {self.classes_[0]!r}, expected at least two.')
    size = min(self.batch_size, len(x))
    if size < 2 or self.epochs < 1 or not self.learning_rate > 0:
      raise ValueError(
        f'batch_size={self.batch_size} (of {len(x)} records), epochs={self.epochs}, learning_rate='
        f'{self.learning_rate}: expected at least 2, at least 1, and a positive number.'
      )
    batch = {
      'features': jax.ShapeDtypeStruct((size, x.shape[1]), jnp.float32),
      'label': jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    optimizer = optax.adam(self.learning_rate)
    program = make_program(self._init, self._loss, optimizer, batch)
    state = jax.jit(program.init)(jax.random.key(self.random_state))
    step = jax.jit(program.step, donate_argnums=0)
    records = {'features': x, 'label': labels.astype(np.int32)}
    loader = make_loader(records, batch_size=size, seed=self.random_state, num_epochs=self.epochs)
    for drawn in loader:
      state, _ = step(state, {}, {name: drawn[name] for name in batch})
    loader.close()
    self.variables_ = jax.device_get({'params': state.params, **state.model_state})
    return self

  def decision_function(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
    """Returns logits `[records, classes]`; of two classes, as scikit-learn has it, their difference."""
    logits = self._logits(X)
    return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

  def predict_proba(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
    """Returns probabilities `[records, classes]`, in the order of `classes_`."""
    return np.asarray(jax.nn.softmax(self._logits(X), -1))

  def predict(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
    """Returns the most probable label of every record."""
    logits = self._logits(X)
    return self.classes_[np.argmax(logits, -1)]

  def _logits(self, x: ArrayLike) -> np.ndarray:
    check_is_fitted(self)
    x = check_array(x, dtype=np.float32)
    if x.shape[1] != self.n_features_in_:
      raise ValueError(
        f'X has {x.shape[1]} features, the network was fitted to {self.n_features_in_}.'
      )
    return np.asarray(_evaluate(self.variables_, x, model=self._network()))

  def _network(self) -> nn.Module:
    sizes = {'patch': self.patch, 'n_mul': self.n_mul, 'n_per': self.n_per}
    return nrs_net(len(self.classes_), tuple(self.hidden), **sizes)

  def _init(self, key: Array) -> Initial:
    variables = dict(self._network().init(key, jnp.zeros((2, self.n_features_in_))))
    return Initial(variables.pop('params'), variables)

  def _loss(
    self, params: PyTree, state: LossState, batch: dict[str, Array], key: Array
  ) -> tuple[Array, Out]:
    del key
    logits, changed = self._network().apply(
      {'params': params, **state.model_state},
      batch['features'],
      train=True,
      mutable=['batch_stats'],
    )
    values = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    return jnp.mean(values), Out({**state.model_state, **changed})


@functools.partial(jax.jit, static_argnames='model')
def _evaluate(variables: PyTree, x: Array, *, model: nn.Module) -> Array:
  """Returns logits; networks of equal sizes share a compilation."""
  return model.apply(variables, x)
