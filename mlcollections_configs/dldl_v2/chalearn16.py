"""Apparent ages of ChaLearn 2016 by ThinAgeNet: training and validation images together."""

from ml_collections import ConfigDict

from mlcollections_configs.dldl_v2 import chalearn15


def get_config() -> ConfigDict:
  """Returns the settings."""
  grid = (0.0, 100.0, 1.0)
  return chalearn15.faces('chalearn16', 5613, grid, train=['train', 'val'], test=['test'])
