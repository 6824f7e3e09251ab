"""Attractiveness of SCUT-FBP by ThinAgeNet, one of five folds of 400 and 100 faces, below `data/scut_fbp`.

Lists `train.txt` and `test.txt` with lines `path mean sigma` of the ratings.
"""

from ml_collections import ConfigDict

from mlcollections_configs.dldl_v2 import chalearn15


def get_config() -> ConfigDict:
  """Returns the settings."""
  return chalearn15.faces('scut_fbp', 400, (1.0, 5.0, 0.1), train=['train'], test=['test'])
