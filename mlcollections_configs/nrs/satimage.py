"""NRS on LIBSVM's table satimage: 36 features, 6 classes, with the constants of the official code."""

from ml_collections import ConfigDict

from mlcollections_configs.nrs import table


def get_config() -> ConfigDict:
  """Returns the settings."""
  return table.libsvm('satimage', 36, 6, 4435, n_mul=20)
