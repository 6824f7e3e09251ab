"""IDMM with T2T-ViT-14 on Oxford Flowers: the settings of T2T-ViT-7."""

from ml_collections import ConfigDict

from mlcollections_configs.idmm import flowers_t2t_vit_7


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = flowers_t2t_vit_7.get_config()
  config.model.name = 't2t_vit_14'
  return config
