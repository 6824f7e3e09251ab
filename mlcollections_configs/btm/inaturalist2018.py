"""BTM on iNaturalist 2018 with ResNet-50, the paper's setting (constants of the official code).

200 epochs, otherwise as on ImageNet-LT. To beat: MiSLAS, 71.6 % (its first stage 66.9 %).
"""

from ml_collections import ConfigDict

from mlcollections_configs.btm import imagenet_lt


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_lt.get_config()
  config.data = dict(name='iNaturalist18')
  config.groups = dict(boundaries=(842, 4543))
  for recipe in (config.network, config.fine_tuning, config.second):
    recipe.optimizer.weight_decay = 1e-4
  config.network.epochs = config.fine_tuning.epochs = 200
  return config
