"""S3L on 2000 images of Fashion-MNIST: 14 pixels, two stages and a network cut short, against 28 pixels.

MoCo v2 with a queue of 512, 40 epochs of 15 steps; 30 labels of
each class. Needs the data set on disk (Debian's package `dataset-fashion-mnist`) or prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.s3l import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data = dict(name='fashion_mnist', test_options=dict(limit=4000))
  config.augment.update(scale=(0.2, 1.0), flip_probability=0.5)
  config.unlabeled = dict(total=2000)
  config.labeled = dict(per_class=30)
  config.model.strides = (2, 2, 2)
  config.recipe.epochs = 40
  config.variants = embedded.variants(28, 14, 10)
  config.claims = embedded.claims(28, 14)
  return config
