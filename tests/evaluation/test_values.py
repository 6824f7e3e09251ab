import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab import evaluation


@golden('dldl_v2', 'evaluation')
def test_measures_agree_with_the_official_code(vectors):
  predictions = (vectors['in_pred'] + vectors['in_pred_flipped']) / 2
  found = evaluation.value_metrics(predictions, vectors['in_labels'], vectors['in_sigmas'])
  for name in ('mae', 'epsilon_error', 'cs3', 'cs5', 'cs8'):
    assert_close(found[name], vectors[f'out_{name}'], 1e-10)


def test_correlation_and_root_mean_square():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 20))
  found = evaluation.value_metrics(a, b)
  assert 'epsilon_error' not in found
  assert_close(found['pearson'], np.corrcoef(a, b)[0, 1], 1e-10)
  assert_close(found['rmse'], np.sqrt(((a - b) ** 2).mean()), 1e-10)
  assert evaluation.value_metrics(np.ones(3), np.arange(3))['pearson'] == 0


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (([1.0], [1.0, 2.0]), 'expected predictions and y'),
    (([], []), 'expected predictions and y'),
    (([1.0, np.nan], [1.0, 2.0]), 'predictions holds NaN or infinity, first at position 1'),
    (([1.0], [1.0], [-1.0]), 'at least 0'),
    (([1.0], [1.0], [1.0, 2.0]), 'sigma must be'),
  ],
)
def test_bad_values_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    evaluation.value_metrics(*arguments)
