"""DiVE on long-tailed digits (ratio 30) with a perceptron; a minute on a CPU.

Temperature 2 with power 0.5 are the constants of the published CIFAR settings; next to them temperature 3
without the power step, for both distillations.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  # 8x8 digits, 100 images of the first class down to 3 of the last; 70 test images a class are drawn first.
  config.data = dict(
    name='digits',
    mean=0.0,
    std=1.0,
    imbalance=dict(kind='split', max_count=100, ratio=30.0, test_per_class=70),
  )
  config.groups = dict(many=50, few=20)
  config.model = dict(name='mlp', hidden=(64, 64))

  config.network = dict(
    epochs=60,
    batch_size=32,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=5e-4),
    schedule=dict(name='cosine', base=0.1),
  )
  config.students = students(temperature=2.0, power=0.5) | dict(
    kd_3=dict(title='KD (3)', loss='kd', temperature=3.0, alpha=0.5),
    dive_3=dict(title='DiVE (3, 1)', loss='dive', temperature=3.0, power=1.0, alpha=0.5),
  )
  config.runs = ('ce', 'bsce', 'kd', 'dive', 'kd_3', 'dive_3')
  config.virtual = dict(teachers=('ce', 'bsce'), temperatures=(1.0, 2.0, 3.0, 4.0, 6.0))

  config.pictured = ('CE', 'KD', 'BSCE', 'DiVE')
  three = 'temperature 3 on both sides'
  config.claims = (
    claim('mean recall at least 1.5 points above plain KD', 'mean', 'KD', 'DiVE', 1.5),
    claim('harmonic mean at least 4 points above plain KD', 'harmonic', 'KD', 'DiVE', 4.0),
    claim(
      f'{three}: mean recall at least 1.5 points above KD', 'mean', 'KD (3)', 'DiVE (3, 1)', 1.5
    ),
    claim(f'{three}: harmonic mean at least 4 above KD', 'harmonic', 'KD (3)', 'DiVE (3, 1)', 4.0),
    claim('virtual examples of BSCE are more level', 'virtual_tau3', 'CE', 'BSCE', 0.0),
    claim('... than the class counts', 'virtual_tau3', 'class counts', 'BSCE', 0.0),
    claim('they level with the temperature (CE)', 'virtual_rise', 'class counts', 'CE', 0.0),
    claim('they level with the temperature (BSCE)', 'virtual_rise', 'class counts', 'BSCE', 0.0),
  )
  config.reported = (
    "CIFAR-100-LT, ratio 100, ResNet-32, mean accuracy in BagofTricks-LT, the authors' code: "
    'cross-entropy 38.3, DiVE 45.5; CIFAR-10-LT 70.4 and 78.9.'
  )
  return config


def students(temperature: float, power: float) -> dict:
  """Returns the students of both teachers."""
  return dict(
    kd=dict(title='KD', loss='kd', temperature=temperature, alpha=0.5),
    dive=dict(title='DiVE', loss='dive', temperature=temperature, power=power, alpha=0.5),
  )


def claim(statement: str, metric: str, baseline: str, method: str, margin: float) -> dict:
  """Returns the claim that `metric` of row `method` is at least `margin` above that of `baseline`."""
  return dict(statement=statement, metric=metric, baseline=baseline, method=method, margin=margin)
