"""DiVE on long-tailed digits (ratio 30) with a perceptron; a minute on a CPU.

  python -m experiments.dive

Temperature 2 with power 0.5 are the constants of the published CIFAR settings; next to them temperature 3
without the power step, for both distillations.
"""

from ml_collections import ConfigDict

from mlcollections_configs import long_tail
from mlcollections_configs.long_tail import claim


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = long_tail.base()
  long_tail.set_digits(config, ratio=30.0)
  recipe = long_tail.digits_recipe()
  long_tail.set_stages(config, stages(recipe) | stages_at_three(recipe))
  config.virtual = virtual()
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
  return config


def virtual() -> dict:
  """Returns whose virtual examples are counted, and at which temperatures."""
  return dict(teachers=('ce', 'bsce'), temperatures=(1.0, 2.0, 3.0, 4.0, 6.0))


def stages(recipe: dict, temperature: float = 2.0, power: float = 0.5, alpha: float = 0.5) -> dict:
  """Returns two teachers and their students, all of one recipe."""
  kd = dict(name='distillation', temperature=temperature, alpha=alpha)
  dive = dict(name='dive', temperature=temperature, power=power, alpha=alpha)
  return dict(
    ce=long_tail.stage('CE', 'baseline', **recipe),
    bsce=long_tail.stage('BSCE', 'baseline', loss='balanced_softmax', **recipe),
    kd=long_tail.stage('KD', 'baseline', loss=kd, teacher='ce', **recipe),
    dive=long_tail.stage('DiVE', 'method', loss=dive, teacher='bsce', **recipe),
  )


def stages_at_three(recipe: dict) -> dict:
  """Returns both students at temperature 3, DiVE without its power step."""
  kd = dict(name='distillation', temperature=3.0, alpha=0.5)
  dive = dict(name='dive', temperature=3.0, power=1.0, alpha=0.5)
  return dict(
    kd_3=long_tail.stage('KD (3)', 'baseline', loss=kd, teacher='ce', **recipe),
    dive_3=long_tail.stage('DiVE (3, 1)', 'method', loss=dive, teacher='bsce', **recipe),
  )
