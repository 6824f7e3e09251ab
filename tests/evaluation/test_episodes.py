import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab.evaluation.episodes import episode_metrics


@golden('acsr', 'episode_metrics')
def test_worst_case_metrics_agree_with_reference(vectors):
  accuracies = vectors['in_episode_accuracies']
  metrics = episode_metrics(accuracies)
  expected = vectors.tree('out_')
  expected['std'] = expected.pop('std_population')
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    assert_close(metrics[name], value, 1e-9)
  shuffled = np.random.default_rng(0).permutation(accuracies)
  assert episode_metrics(shuffled) == metrics


def test_lowest_of_few_episodes_are_all_of_them():
  metrics = episode_metrics(np.array([0.9, 0.5, 0.7]))
  assert metrics['acc_1'] == 0.5
  assert metrics['acc_10'] == metrics['acc_100'] == metrics['acc_mean'] == pytest.approx(0.7)
  one = episode_metrics([1.0])
  assert one['std'] == one['ci95_half_width'] == 0 and one['mean_minus_3std'] == 1


@pytest.mark.parametrize(
  ('accuracies', 'message'),
  [
    ([], r'shape \(0,\), expected \[episodes\]'),
    ([[0.5]], r'shape \(1, 1\)'),
    ([0.5, np.nan], 'expected shares'),
    ([55.0, 60.0], 'from 55.0 to 60.0, expected shares in .* not percent'),
  ],
)
def test_bad_input_is_named(accuracies, message):
  with pytest.raises(ValueError, match=message):
    episode_metrics(np.array(accuracies))
