"""GML over a cross-entropy ResNet-32 on CIFAR-10-LT, otherwise as `cifar100_lt.py`.

  python -m experiments.gml --config=mlcollections_configs/gml/cifar10_lt.py --workdir=DIR

Prepare the data once: `tfds build cifar10 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.gml import cifar100_lt


def get_config() -> ConfigDict:
  """Returns the configuration."""
  return cifar100_lt.cifar(10)
