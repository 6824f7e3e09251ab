"""S3L by BYOL with ResNet-18 on CUB-200, 800 epochs (constants of the official code).

Heads of 4096 and 128 channels, whatever its options say; the target keeps 0.99 of itself, constantly.
"""

from ml_collections import ConfigDict

from mlcollections_configs.s3l import cub_moco_resnet50


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = cub_moco_resnet50.get_config()
  config.ssl = 'byol'
  config.model = dict(name='resnet18')
  config.heads = dict(hidden=4096, features=128, predictor=4096)
  config.target = dict(momentum=0.99)
  config.recipe['schedule']['base'] = 0.125
  return config
