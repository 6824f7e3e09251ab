"""Combinations that no paper ran: plain, TWEO and CD training, each behind post-training pipelines.

Data and network are those of `embedded`; at this learning rate the peak is far above 30, too. Rows are
trainings, metrics are named by pipeline and bits; 16 bits stand for float.
"""

from ml_collections import ConfigDict

from mlcollections_configs.colinearity_decay import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.network.recipe.schedule.base = 2.5e-2
  config.runs = ('plain', 'tweo', 'cd')
  config.variants = {}
  config.schemes = ('stream',)
  config.pipelines = (
    'AbsMax', 'AbsMax + QwT', 'AbsMax + QwT-v2', 'AbsMax + NBC', 'SmoothQuant',
    'RepQ', 'RepQ + QwT', 'RepQ + QwT-v2', 'RepQ + NBC',
  )  # fmt: skip
  config.timed = 0
  config.claims = ()
  return config
