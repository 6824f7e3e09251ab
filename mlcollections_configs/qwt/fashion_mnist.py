"""QwT on a vision transformer and a ResNet for Fashion-MNIST.

  python -m experiments.qwt --config=fashion_mnist

The first 10240 training images; needs the data set on disk (Debian's package `dataset-fashion-mnist`) or
prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import fashion_networks, gain, lower
from mlcollections_configs.qwt import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.networks = ('vit', 'resnet')
  config.network = fashion_networks()
  config.networks_dir = 'runs/networks_fashion_mnist'
  config.claims = (
    gain('QwT', 'vit', '2w3a', 4.0),
    gain('QwT', 'resnet', '2w3a', 0.0),
    lower('QwT', 'vit', '2w3a', 0.3),
    lower('QwT', 'resnet', '2w3a', 0.1),
  )
  return config
