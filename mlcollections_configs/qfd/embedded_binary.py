"""QFD at one bit: `embedded` with binary kernels and activations, where by the paper QFD alone helps.

python -m experiments.qfd --config=embedded_binary
"""

from ml_collections import ConfigDict

from mlcollections_configs.qfd import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.bits = ('1w1a',)
  config.claims = (
    embedded.claim('QFD not below training under quantization', '1w1a', 0.0),
    embedded.claim('QFD not below distilled logits', '1w1a', 0.0, baseline='logits distilled'),
    embedded.claim(
      'QFD not below distilled float features', '1w1a', 0.0, baseline='float features distilled'
    ),
  )
  return config
