"""SSQL on MoCo v2 with CIFAR ResNet-18 on CIFAR-10 (constants of the official code).

  python -m experiments.ssql --config=mlcollections_configs/ssql/cifar10_moco.py --workdir=DIR

Batch 8x64 with separate batch statistics, keys shuffled among the groups, a queue of 4096 keys,
temperature 0.2.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ssql import cifar10_resnet18


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = cifar10_resnet18.get_config()
  config.base = 'moco'
  config.model.backbone.norm_groups = 8
  config.model.projector = dict(hidden=2048, features=256)
  config.momentum = 0.999
  config.queue_size = 4096
  config.temperature = 0.2
  config.optimizer.weight_decay = 1e-4
  config.schedule.base = 0.3
  return config
