"""GML on long-tailed Fashion-MNIST (500 to 5 images a class) with a small residual network.

Needs the data set on disk (Debian's package `dataset-fashion-mnist`) or prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.gml import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data = dict(
    name='fashion_mnist', imbalance=dict(kind='exponential', max_count=500, ratio=100.0)
  )
  config.groups = dict(many=100, few=20)
  config.augment = dict(kind='pad_crop', padding=2, flip=False)
  config.model = dict(name='cifar_resnet18', stage_sizes=(1, 1, 1), strides=(2, 2, 2), width=16)
  config.network.update(epochs=40, batch_size=64)
  config.classifier.update(epochs=20, batch_size=64)
  return config
