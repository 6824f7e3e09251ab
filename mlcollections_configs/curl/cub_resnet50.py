"""CURL with ResNet-50 on CUB-200-2011: 1.1 of 4.09 billion multiply-accumulates.

As `cub_mobilenetv2`, with 150 epochs of mixup and distillation (the code's list is cut at 7700 entries). Stem
and last trunk stay whole.
"""

from ml_collections import ConfigDict

from mlcollections_configs.curl import cub_mobilenetv2, embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = cub_mobilenetv2.get_config()
  config.network = cub_mobilenetv2.birds('resnet50', 'resnet50.tv_in1k')
  config.protected = ('stem', 'layer4')
  config.shares = (1.1 / 4.09,)
  config.recipe = embedded.tuning(epochs=150, base=0.01, warmup_epochs=5)
  return config
