"""QwT behind GPTQ: the byte-level GPT-2 of `embedded.py`, weights alone at 4, 3 and 2 bits.

  python -m experiments.qwt --config=embedded_gptq

About a minute of CPU time where `embedded.py` has trained the network.
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import lower
from mlcollections_configs.qwt import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.networks = ('text',)
  config.network.text.quantization = 'gptq'
  config.network.text.gptq = dict(group_size=None, act_order=False, damping=0.01)
  config.bits = ('4w16a', '3w16a', '2w16a')
  config.claims = (lower('QwT', 'text', '2w16a', 0.0),)
  return config
