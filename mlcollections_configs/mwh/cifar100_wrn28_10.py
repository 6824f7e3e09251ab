"""mWh with WRN-28-10 on CIFAR-100; else as `cifar100_preact_resnet18` (constants of the code).

Prepare the data once: `tfds build cifar100 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.mwh import cifar100_preact_resnet18


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = cifar100_preact_resnet18.get_config()
  config.network.model.name = 'wrn28_10'
  return config
