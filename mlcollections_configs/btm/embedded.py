"""BTM on long-tailed digits (ratio 50) with a perceptron: six subsets of at most 5 images a class; a minute.

A subset has 44 images; at batch 16 an epoch of the fine-tuning is two steps and leaves 12 images out, other
ones each time. Second stages: a class-balanced classifier (cRT), and MiSLAS' label-aware smoothing with
learnable weight scaling, each over the network of the first stage and over the merged one.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  # 8x8 digits, 100 images of the first class down to 2 of the last; 70 test images a class are drawn first.
  config.data = dict(
    name='digits',
    mean=0.0,
    std=1.0,
    imbalance=dict(kind='split', max_count=100, ratio=50.0, test_per_class=70),
  )
  config.groups = dict(many=50, few=20)
  config.model = dict(name='mlp', hidden=(64, 64))

  sgd = dict(name='sgd', momentum=0.9, weight_decay=5e-4)
  cosine, stairs = dict(name='cosine', base=0.1), dict(name='cosine_per_epoch', base=0.1)
  config.network = dict(epochs=60, batch_size=32, optimizer=sgd, schedule=cosine)
  config.fine_tuning = dict(
    epochs=60, batch_size=16, optimizer=sgd, schedule=dict(name='cosine', base=0.02)
  )
  config.merging = dict(count=6, cap=5, vmapped=True)
  config.crt = dict(epochs=30, batch_size=32, optimizer=sgd, schedule=cosine)
  config.second = dict(epochs=30, batch_size=32, optimizer=sgd | scaling(0.2), schedule=stairs)
  config.smoothing = dict(head=0.3, tail=0.0)
  config.runs = ('stage1', 'balanced', 'crt_stage1', 'crt_merged', 'las_stage1', 'las_merged')

  config.pictured = ('CE', 'merged', 'merged + cRT')
  config.claims = (
    claim(
      'harmonic mean of the merged network at least 3 above CE', 'harmonic', 'CE', 'merged', 3.0
    ),
    claim('mean recall at least 1 point above CE', 'mean', 'CE', 'merged', 1.0),
    claim('mean at most 0.5 below a single subset', 'mean', 'single subset', 'merged', -0.5),
  )
  config.reported = (
    'Balanced subsets raise harmonic and geometric mean strongly at a lower mean; merging and a '
    'second stage keep the mean almost as it was (ImageNet-LT, Places-LT, iNaturalist 2018).'
  )
  return config


def scaling(factor: float) -> dict:
  """Returns the learning rate of MiSLAS' classifier, `factor` times that of the classes' factors."""
  return dict(lr_multipliers=(('head/(kernel|bias)', factor),))


def claim(statement: str, metric: str, baseline: str, method: str, margin: float) -> dict:
  """Returns the claim that `metric` of row `method` is at least `margin` above that of `baseline`."""
  return dict(statement=statement, metric=metric, baseline=baseline, method=method, margin=margin)
