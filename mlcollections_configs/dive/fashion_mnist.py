"""DiVE on long-tailed Fashion-MNIST (500 to 5 images a class) with a small residual network.

  python -m experiments.dive --config=mlcollections_configs/dive/fashion_mnist.py

Needs the data set on disk (Debian's package `dataset-fashion-mnist`) or prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs import long_tail
from mlcollections_configs.dive import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  long_tail.set_fashion_mnist(config)
  config.augment = dict(kind='pad_crop', padding=2, flip=False)
  long_tail.set_stages(config, embedded.stages(long_tail.recipe(40, 64, 0.1, 5e-4)))
  config.claims = tuple(c for c in config.claims if '3' not in c['method'])
  return config
