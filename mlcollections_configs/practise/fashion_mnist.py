"""PRACTISE on a ResNet of Fashion-MNIST: three of nine blocks dropped with 100 images.

python -m experiments.practise --config=fashion_mnist
"""

from ml_collections import ConfigDict

from mlcollections_configs.mir.fashion_mnist import fashion
from mlcollections_configs.practise import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.network = fashion(blocks=4)
  config.augment = config.network['augment']
  config.recovery = dict(steps=200)
  config.tuning = dict(steps=300)
  return config
