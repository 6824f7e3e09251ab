"""QFD on a small vision transformer of pasted digits: all layers of attention and MLP with 2 bits.

python -m experiments.qfd --config=embedded_vit
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import vit
from mlcollections_configs.qfd import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.network = vit(embedded.digits(), 'vit_tiny_patch4_16', epochs=20)
  config.target = dict(bits=(4,))
  config.rows = ('baseline', 'features')
  config.claims = (embedded.claim('QFD not below training under quantization', '2w2a', 0.0),)
  return config
