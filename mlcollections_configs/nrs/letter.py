"""NRS on LIBSVM's table letter: 16 features, 26 classes, with the constants of the official code."""

from ml_collections import ConfigDict

from mlcollections_configs.nrs import table


def get_config() -> ConfigDict:
  """Returns the settings."""
  return table.libsvm('letter', 16, 26, 15000, n_mul=100, epochs=100)
