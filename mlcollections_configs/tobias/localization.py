"""Boxes of digits by random CNNs, without pretraining; seconds of CPU time."""

from ml_collections import ConfigDict

from mlcollections_configs.tobias import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.runs = ()
  config.claims = embedded.localized()
  return config
