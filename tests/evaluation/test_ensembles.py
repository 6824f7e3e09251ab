import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab.evaluation import ensemble


@golden('acsr', 'ensemble')
def test_ensemble_agrees_with_reference(vectors):
  mean, predictions = ensemble(vectors['in_member_probabilities'])
  assert_close(mean, vectors['out_mean_probabilities'], 1e-9)
  np.testing.assert_array_equal(predictions, vectors['out_predictions'])


def test_one_member_says_what_it_says():
  probabilities = np.float32([[0.25, 0.75], [0.5, 0.5]])
  found = ensemble([probabilities])
  np.testing.assert_array_equal(found.probabilities, probabilities)
  assert found.probabilities.dtype == np.float64 and found.predictions.tolist() == [1, 0]


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ([0.5, 0.5], r'shape \(2,\), expected \[members'),
    (np.zeros((0, 3, 2)), 'not empty'),
    ([[2.0, -1.0]], 'run from -1.0 to 2.0'),
    ([[np.nan, 1.0]], 'run from nan'),
  ],
)
def test_what_is_no_ensemble_is_refused(given, message):
  with pytest.raises(ValueError, match=message):
    ensemble(given)
