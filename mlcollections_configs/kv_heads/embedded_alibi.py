"""KV heads on a byte-level BLOOM, whose positions are linear biases: keys fold as values do; minutes.

  python -m experiments.kv_heads --config=embedded_alibi

Three blocks of width 64, eight heads of 8 channels; 400 steps, calibrated on 64 windows.
"""

from ml_collections import ConfigDict

from mlcollections_configs.kv_heads import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.network = embedded.text(dict(name='bloom_560m', num_heads=8))
  config.runs = ('svd_a', 'svd_w', 'mean')
  config.claims = (*embedded.claims(2), *embedded.claims(4))
  return config
