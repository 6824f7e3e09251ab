"""IDMM with T2T-ViT-7 on Oxford Flowers (official scripts); at 448 pixels batch 32, learning rate 1.25e-5.

All else as `flowers_pvt_v2_b0`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.idmm import flowers_pvt_v2_b0


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = flowers_pvt_v2_b0.get_config()
  config.model.name = 't2t_vit_7'
  config.stages.at448.recipe.batch_size = 32
  config.stages.at448.recipe.schedule.base = 1.25e-5
  return config
