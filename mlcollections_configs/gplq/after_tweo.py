"""TWEO, then GPLQ: `after_plain` with TWEO's term in the loss that the float network is trained with."""

from ml_collections import ConfigDict

from mlcollections_configs.gplq import after_plain


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = after_plain.get_config()
  config.penalty = dict(weight=0.01, tau=3.0, power=4.0)
  return config
