"""Colinearity Decay, then GPLQ: `after_plain` with CD in the optimizer of the float network's training."""

from ml_collections import ConfigDict

from mlcollections_configs.gplq import after_plain


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = after_plain.get_config()
  config.decay = dict(lam=0.1, per_head=False)
  return config
