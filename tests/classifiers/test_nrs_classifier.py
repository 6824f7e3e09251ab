import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jaxlab.classifiers import NRSClassifier

FAST = {'n_mul': 2, 'hidden': (8,), 'epochs': 8, 'batch_size': 16, 'learning_rate': 0.01}


@pytest.fixture(scope='module')
def fitted():
  options = {'n_features': 10, 'n_informative': 6, 'n_classes': 3, 'class_sep': 3.0}
  x, y = make_classification(200, random_state=0, **options)
  y = np.array(['one', 'two', 'three'])[y]
  return make_pipeline(StandardScaler(), NRSClassifier(**FAST)).fit(x[:150], y[:150]), x, y


def test_it_learns_in_a_pipeline(fitted):
  model, x, y = fitted
  assert model.score(x[150:], y[150:]) > 0.8
  assert model.classes_.tolist() == ['one', 'three', 'two']
  probabilities = model.predict_proba(x)
  np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
  assert (model.classes_[probabilities.argmax(1)] == model.predict(x)).all()
  assert model[-1].decision_function(x).shape == (200, 3)


def test_it_can_be_cloned_pickled_and_repeated(fitted):
  model, x, y = fitted
  expected = model.predict_proba(x)
  again = pickle.loads(pickle.dumps(model))
  np.testing.assert_array_equal(again.predict_proba(x), expected)
  other = clone(model).fit(x[:150], y[:150])
  np.testing.assert_allclose(other.predict_proba(x), expected, rtol=1e-5, atol=1e-6)
  assert clone(model[-1]).get_params() == model[-1].get_params()


def test_decisions_of_two_classes_are_one_number(fitted):
  _, x, y = fitted
  two = y != 'two'
  model = NRSClassifier(**{**FAST, 'epochs': 1}).fit(x[two], y[two])
  decisions = model.decision_function(x)
  assert decisions.shape == (200,)
  assert ((decisions > 0) == (model.predict(x) == model.classes_[1])).all()


@pytest.mark.parametrize(
  ('changes', 'x', 'y', 'message'),
  [
    ({}, np.ones(20), np.arange(20) % 2, '2D array'),
    ({}, np.full((20, 9), np.nan), np.arange(20) % 2, 'NaN'),
    ({}, np.ones((20, 9)), np.arange(19) % 2, 'inconsistent numbers of samples'),
    ({}, np.ones((20, 9)), np.zeros(20), 'the one class'),
    ({}, np.ones((20, 9)), np.linspace(0, 1, 20), 'continuous'),
    ({'patch': 4}, np.ones((20, 9)), np.arange(20) % 2, 'patch=4'),
    ({'n_per': 4}, np.ones((20, 9)), np.arange(20) % 2, 'n_per=4'),
    ({'epochs': 0}, np.ones((20, 9)), np.arange(20) % 2, 'epochs=0'),
    ({'batch_size': 1}, np.ones((20, 9)), np.arange(20) % 2, 'batch_size=1'),
  ],
)
def test_bad_input_is_named(changes, x, y, message):
  with pytest.raises(ValueError, match=message):
    NRSClassifier(**{**FAST, **changes}).fit(x, y)


def test_other_tables_than_that_of_the_training_are_refused(fitted):
  model, x, _ = fitted
  with pytest.raises(ValueError, match='fitted to 10'):
    model[-1].predict(x[:, :9])
  with pytest.raises(ValueError, match='NaN'):
    model[-1].predict(np.full((2, 10), np.nan))
  with pytest.raises(ValueError, match='not fitted'):
    NRSClassifier().predict(x)
