"""GPLQ behind a training whose activations grow large; `after_tweo` and `after_cd` keep them small.

Data and network are those of `tweo` and of `colinearity_decay/combinations`: digits, at a high learning rate.

  python -m experiments.gplq --config=after_plain
  python -m experiments.gplq --config=after_tweo
  python -m experiments.gplq --config=after_cd

The first stage takes eight epochs, 320 steps; one is 40 steps of so few digits. Its learning rate is the best
of three, 1e-4, 1e-3 and 3e-3, on seed 10 of this setting.
"""

from ml_collections import ConfigDict

from mlcollections_configs import outliers


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.network = outliers.digits_vit(base=2.5e-2)
  config.bits = ('8w8a', '4w4a', '3w3a')
  config.calibration = 512
  config.batch_size = 32
  config.recipe = dict(
    epochs=8,
    batch_size=32,
    optimizer=dict(name='adamw', weight_decay=0.0),
    schedule=dict(name='constant', base=1e-3),
  )
  config.mimicking = dict(weight=1.0, images=0, multiple=8)
  config.rows = ()
  return config
