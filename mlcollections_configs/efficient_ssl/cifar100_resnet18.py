"""Single-branch learning with CIFAR ResNet-18 on CIFAR-100: the settings of CIFAR-10."""

from ml_collections import ConfigDict

from mlcollections_configs.efficient_ssl import cifar10_resnet18


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = cifar10_resnet18.get_config()
  config.data = dict(name='cifar100')
  return config
