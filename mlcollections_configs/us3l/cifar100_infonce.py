"""US3L with InfoNCE as base loss (a momentum encoder, no predictor of the whole network), on CIFAR-100."""

from ml_collections import ConfigDict

from mlcollections_configs.us3l import cifar100_resnet18


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = cifar100_resnet18.get_config()
  config.variants.us3l = dict(title='US3L', base='infonce', predictor=False)
  config.runs = ('us3l',)
  config.heads.features = 256
  config.temperature = 0.5
  config.group_decay.decay = 5e-5
  config.recipe.schedule.base = 0.5
  return config
