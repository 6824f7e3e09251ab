"""What the accuracies of few-shot episodes say about the one episode that a user will run."""

import numpy as np


def episode_metrics(accuracies: np.ndarray) -> dict[str, float]:
  """Mean, spread and worst cases of episode accuracies; host code, in float64.

  Args:
    accuracies: `[episodes]`, shares in [0, 1].

  Returns:
    - `acc_mean`: mean.
    - `std`: the population's standard deviation (divided by the number of episodes).
    - `acc_1`, `acc_10`, `acc_100`: mean of the 1, 10, 100 lowest; of all where there are fewer episodes.
    - `mean_minus_3std`: acc_mean - 3 std, a proxy of the worst case.
    - `ci95_half_width`: 1.96 std / sqrt(episodes), of the 95 % interval of the mean.

  Raises:
    ValueError: no episodes, NaN, or numbers outside [0, 1].

  References:
    Fu et al., Worst Case Matters for Few-Shot Recognition, ECCV 2022, https://arxiv.org/abs/2203.06574.

  >>> metrics = episode_metrics(np.array([0.8, 0.6, 1.0]))
  >>> [round(metrics[name], 3) for name in ('acc_mean', 'std', 'acc_1', 'mean_minus_3std')]
  [0.8, 0.163, 0.6, 0.31]
  """
  values = np.sort(np.asarray(accuracies, np.float64))
  if values.ndim != 1 or not values.size:
    raise ValueError(f'accuracies have shape {values.shape}, expected [episodes], not empty.')
  if not np.all((values >= 0) & (values <= 1)):
    raise ValueError(
      f'accuracies run from {values.min()} to {values.max()}, expected shares in [0, 1], not percent.'
    )
  mean, std = values.mean(), values.std()
  metrics = {
    'acc_mean': mean,
    'std': std,
    **{f'acc_{count}': values[:count].mean() for count in (1, 10, 100)},
    'mean_minus_3std': mean - 3 * std,
    'ci95_half_width': 1.96 * std / np.sqrt(values.size),
  }
  return {name: float(value) for name, value in metrics.items()}
