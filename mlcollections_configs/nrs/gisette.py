"""NRS on LIBSVM's table gisette: 5000 features, 2 classes, with the constants of the official code."""

from ml_collections import ConfigDict

from mlcollections_configs.nrs import table


def get_config() -> ConfigDict:
  """Returns the settings."""
  return table.libsvm(
    'gisette', 5000, 2, 6000, n_mul=1, hidden=512, epochs=20, batch_size=512, suffix='_scale'
  )
