"""IbM2 on scikit-learn's digits: raw pixels and 256 random ReLU features, 1 and 5 images per class.

  python -m experiments.ibm2

Four draws of each few-shot set, all at once. With ten classes the clean accuracy hardly moves; what must
show is the margin: higher accuracy under noise.

  python -m experiments.ibm2 --config.features=FILE.npz

takes a user's own features in their place: all of them, or `--config.features_shots=1,5` of each class.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.data = dict(name='digits')
  config.representations = ('raw', 'relu')
  config.relu = dict(units=256, weight_std=0.25, bias_std=0.3)
  config.shots = (1, 5)
  config.draws = 4

  config.num_copies = 50  # 200 in the paper
  config.eval = dict(num_copies=20)

  config.claims = ()
  for name in ('raw_1shot', 'raw_5shot', 'relu_1shot', 'relu_5shot'):
    config.claims += (
      claim(f'{name}: the bisection ends in an interval below 0.05', f'{name}_width', 'required', 0.0),
      claim(
        f'{name}: at epsilon - 0.5 every draw fits its noisy copies beyond the threshold',
        f'{name}_slack_below', 'required', 0.0,
      ),
      claim(
        f'{name}: at epsilon + 0.5 no draw does', f'{name}_slack_above', 'required', 0.0
      ),
    )  # fmt: skip
  for name in ('relu_1shot', 'relu_5shot'):
    config.claims += (
      claim(
        f'{name}: at most 1.5 points below the plain head on clean test features',
        f'{name}_accuracy', 'naive', -1.5,
      ),
      claim(
        f'{name}: at least 3 points above the plain head on noisy test features',
        f'{name}_noisy_accuracy', 'naive', 3.0,
      ),
    )  # fmt: skip
  config.reported = (
    'Almost always above its baseline, often significantly (ImageNet with 1 to 16 shots and with 1 %, '
    'CUB, mini-ImageNet, CIFAR-FS).'
  )
  return config


def claim(statement: str, metric: str, baseline: str, margin: float) -> dict:
  """Returns a claim about IbM2's row; an interval is the better the shorter it is."""
  return dict(
    statement=statement,
    metric=metric,
    baseline=baseline,
    method='IbM2',
    higher_is_better=not metric.endswith('width'),
    margin=margin,
  )
