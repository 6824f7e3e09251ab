"""IDMM with PVTv2-B0 on Oxford Flowers (official scripts): label smoothing and another learning rate.

All else as `flowers_deit_tiny`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.idmm import flowers_deit_tiny


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = flowers_deit_tiny.get_config()
  config.model.name = 'pvt_v2_b0'
  config.instances.label_smoothing = 0.1
  for recipe in (config.recipe, config.stages.at224.recipe):
    recipe.schedule.update(base=1e-3, warmup_epochs=10)
  config.stages.at448.recipe.schedule.warmup_epochs = 10
  return config
