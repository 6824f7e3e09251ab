"""GML over a cross-entropy ResNet-32 on CIFAR-10-LT, otherwise as `cifar100_lt.py`.

Prepare the data once: `tfds build cifar10 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.gml import cifar100_lt


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = cifar100_lt.get_config()
  config.data = dict(
    name='cifar10', imbalance=dict(kind='exponential', max_count=5000, ratio=100.0)
  )
  # No class has few images: the three largest are the head, the three smallest the tail.
  config.groups = dict(boundaries=(3, 7))
  return config
