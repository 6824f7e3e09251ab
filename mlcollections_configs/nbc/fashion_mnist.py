"""NBC on a vision transformer and a ResNet for Fashion-MNIST, as QwT's setting of that name.

python -m experiments.nbc --config=mlcollections_configs/nbc/fashion_mnist.py

The networks are trained once and kept for the other papers.
"""

from ml_collections import ConfigDict

from mlcollections_configs.nbc import embedded
from mlcollections_configs.qwt import fashion_mnist


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = fashion_mnist.get_config()
  config.qwt.fine_tuning = None
  own = embedded.get_config()
  config.nbc = own.nbc
  config.claims = tuple(c for c in own.claims if c['metric'].startswith(('vit_2', 'resnet_2')))
  return config
