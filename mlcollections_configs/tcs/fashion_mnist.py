"""A teacher that tells five groups of Fashion-MNIST, students of ten classes from 1000 labels; minutes.

The teacher sees 10000 images as trousers and T-shirts, pullovers and dresses, and so on: pairs of neighboring
classes. Needs the data set on disk (Debian's package `dataset-fashion-mnist`) or prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.feature_mimicking import fashion_mnist
from mlcollections_configs.tcs import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  start = fashion_mnist.get_config()
  groups = config.teacher.groups
  config.teacher, config.student = start.teacher, start.student
  config.teacher.groups = groups
  config.tutor.update(epochs=15, batch_size=64)
  config.log_every = 150
  return config
