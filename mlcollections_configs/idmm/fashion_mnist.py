"""The same on 512 images of Fashion-MNIST, 28 pixels in patches of 7, neither flipped nor jittered.

Needs the data set on disk (Debian's package `dataset-fashion-mnist`) or prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.idmm import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data = dict(
    name='fashion_mnist',
    train_size=512,
    train_options=dict(limit=512),
    test_options=dict(limit=2000),
  )
  config.augment = dict(kind='resized_crop', scale=(0.3, 1.0), flip_probability=0.0)
  config.model.update(patch_size=7, image_size=28)
  return config
