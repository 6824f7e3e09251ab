"""IDMM with DeiT-Tiny on Stanford Cars: the settings of Flowers.

Prepare the data once: `tfds build cars196 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.idmm import flowers_deit_tiny


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = flowers_deit_tiny.get_config()
  config.data = dict(
    name='cars196', image_size=112,
    mean=flowers_deit_tiny.MEAN, std=flowers_deit_tiny.STD,
    test_decode=dict(size=112, resize=128),
  )  # fmt: skip
  return config
