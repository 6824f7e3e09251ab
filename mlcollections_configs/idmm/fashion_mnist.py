"""The same on 512 images of Fashion-MNIST, 28 pixels in patches of 7.

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
  config.augment = dict(
    kind='resized_crop', jitter=(0.4, 0.0, 0.0, 0.0), flip_probability=0.5, scale=(0.3, 1.0)
  )
  config.model.update(patch_size=7, image_size=28)
  config.stages = dict(
    labels=dict(recipe=embedded.recipe(base=5e-4), augment=config.augment.to_dict(), mix='cutmix')
  )
  return config
