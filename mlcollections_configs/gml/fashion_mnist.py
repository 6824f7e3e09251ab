"""GML on long-tailed Fashion-MNIST (500 to 5 images a class) with a small residual network.

  python -m experiments.gml --config=mlcollections_configs/gml/fashion_mnist.py

Needs the data set on disk (Debian's package `dataset-fashion-mnist`) or prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs import long_tail
from mlcollections_configs.gml import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  long_tail.set_fashion_mnist(config)
  config.augment = dict(kind='pad_crop', padding=2, flip=False)
  backbone, classifier = (long_tail.recipe(epochs, 64, 0.1, 5e-4) for epochs in (40, 20))
  stages = embedded.stages(backbone, classifier, crt=classifier, lws=classifier)
  long_tail.set_stages(config, stages, skip=('ce_holdout',))
  return config
