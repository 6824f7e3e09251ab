"""Ages of Morph II by ThinAgeNet, one of five random folds of 80 % and 20 %, below `data/morph`.

Lists `train.txt` and `test.txt` with lines `path age`; the deviation is 2 for all [from memory].
"""

from ml_collections import ConfigDict

from mlcollections_configs.dldl_v2 import chalearn15


def get_config() -> ConfigDict:
  """Returns the settings."""
  grid = (0.0, 100.0, 1.0)
  return chalearn15.faces('morph', 44107, grid, train=['train'], test=['test'], sigma=2.0)
