"""NBC on a vision transformer and a ResNet for Fashion-MNIST, as QwT's setting of that name.

  python -m experiments.nbc --config=fashion_mnist

The networks are trained once and kept for the other papers.
"""

from ml_collections import ConfigDict

from mlcollections_configs.nbc import embedded
from mlcollections_configs.post_training import fashion_networks, gain, lower


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.networks = ('vit', 'resnet')
  config.network = fashion_networks()
  config.networks_dir = 'runs/networks_fashion_mnist'
  config.claims = (
    gain('NBC', 'vit', '2w3a', 4.0),
    gain('NBC', 'vit', '2w3a', -1.5, baseline='QwT'),
    lower('NBC', 'resnet', '2w3a', 0.1),
  )
  return config
