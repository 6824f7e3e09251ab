"""IDMM with DeiT-Tiny on MIT Indoor-67: the settings of Flowers.

Photographs as folders of classes, `data/indoor67/train/CLASS/*.jpg` and `data/indoor67/test`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.idmm import flowers_deit_tiny


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = flowers_deit_tiny.get_config()
  config.data = dict(
    name='image_folder', num_classes=67, train_size=5360, image_size=112,
    train_options=dict(root='data/indoor67', decode=False),
    test_options=dict(root='data/indoor67', decode=False),
    train_decode=dict(size=256, draft=True), test_decode=dict(size=112, resize=128),
    stored_image=(256, 256, 3), num_threads=16,
    mean=flowers_deit_tiny.MEAN, std=flowers_deit_tiny.STD,
  )  # fmt: skip
  return config
