"""SSQL on MoCo v2 with CIFAR ResNet-18 on CIFAR-10 (constants of the official code).

Batch 8x64 with separate batch statistics, keys shuffled among the groups, a queue of 4096 keys,
temperature 0.2.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ssql import cifar10_resnet18


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = cifar10_resnet18.get_config()
  config.base = 'moco'
  config.model.norm_groups = 8
  config.heads = dict(hidden=2048, features=256)
  config.target = dict(momentum=0.999, queue_size=4096, temperature=0.2)
  config.recipe.optimizer.weight_decay = 1e-4
  config.recipe.schedule.base = 0.3
  return config
