"""NRS on LIBSVM's table usps: 256 features, 10 classes, with the constants of the official code."""

from ml_collections import ConfigDict

from mlcollections_configs.nrs import table


def get_config() -> ConfigDict:
  """Returns the settings."""
  return table.libsvm('usps', 256, 10, 7291, n_mul=20, suffix='')
