"""IDMM with DeiT-S on Oxford Flowers: the settings of DeiT-Tiny."""

from ml_collections import ConfigDict

from mlcollections_configs.idmm import flowers_deit_tiny


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = flowers_deit_tiny.get_config()
  config.model.name = 'deit_small_patch16_224'
  return config
