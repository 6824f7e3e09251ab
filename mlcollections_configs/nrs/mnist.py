"""NRS on LIBSVM's table mnist: 780 features, 10 classes, with the constants of the official code."""

from ml_collections import ConfigDict

from mlcollections_configs.nrs import table


def get_config() -> ConfigDict:
  """Returns the settings."""
  return table.libsvm('mnist', 780, 10, 60000, n_mul=5, hidden=512, epochs=20, batch_size=512)
