"""QwT-v2 on a vision transformer and a ResNet for Fashion-MNIST, as QwT's setting of that name.

python -m experiments.qwt_v2 --config=mlcollections_configs/qwt_v2/fashion_mnist.py

The networks are trained once and kept for the other papers.
"""

from ml_collections import ConfigDict

from mlcollections_configs.qwt import fashion_mnist
from mlcollections_configs.qwt_v2 import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = fashion_mnist.get_config()
  config.qwt.fine_tuning = None
  own = embedded.get_config()
  config.qwt_v2 = own.qwt_v2
  config.claims = tuple(c for c in own.claims if c['metric'].startswith(('vit_2', 'resnet_2')))
  return config
