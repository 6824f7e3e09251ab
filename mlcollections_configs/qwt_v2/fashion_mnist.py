"""QwT-v2 on a vision transformer and a ResNet for Fashion-MNIST, as QwT's setting of that name.

  python -m experiments.qwt_v2 --config=fashion_mnist

The networks are trained once and kept for the other papers.
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import fashion_networks, gain, lower
from mlcollections_configs.qwt_v2 import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.networks = ('vit', 'resnet')
  config.network = fashion_networks()
  config.networks_dir = 'runs/networks_fashion_mnist'
  config.calibration.batch_size = 32
  config.claims = (
    gain('QwT-v2', 'vit', '2w3a', 2.0),
    gain('QwT-v2', 'resnet', '2w3a', 0.0),
    lower('QwT-v2', 'vit', '2w3a', 0.1),
    lower('QwT-v2', 'resnet', '2w3a', 0.1),
  )
  return config
