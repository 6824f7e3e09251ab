"""TWEO with a vision transformer on digits, at a learning rate that makes outliers; some minutes.

The learning rate is high on purpose: at a tenth of it the network has no outliers and TWEO changes nothing.
"""

from ml_collections import ConfigDict

from mlcollections_configs import outliers

# Quantized with the residual stream: T/T, C/T and C/K of weights and activations; T/T without it; and both
# finer ones behind SmoothQuant, with and without it.
SCHEMES = (
  'stream', 'linear', 'channel', 'token',
  'channel_smooth', 'token_smooth', 'channel_linear_smooth', 'token_linear_smooth',
)  # fmt: skip


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.network = outliers.digits_vit(base=2.5e-2)
  config.log_every = 4

  config.penalty = dict(weight=0.01, tau=3.0, power=4.0)
  config.bits = ('8w8a', '4w4a', '16w3a', '3w3a')
  config.schemes = SCHEMES
  config.calibration = dict(count=512, batch_size=128)
  config.runs = ('plain', 'tweo', 'tweo_float8')

  config.claims = (
    claim('3-bit activations: at least 3 points better', '16w3a_accuracy', 3.0),
    claim('3-bit weights and activations: at least 3 points better', '3w3a_accuracy', 3.0),
    claim('accuracy in float within 1 point', 'accuracy', -1.0),
    claim('final peak at least 20 lower', 'peak', 20.0, False),
  )
  config.reported = (
    'ImageNet: Swin-T 81.2 without and 81.4 % with TWEO, peak in training 1556 and 22; Swin-S 82.7 and 82.8, '
    '6402 and 35; ViT-B 81.3 and 81.3, 1579 and 38.'
  )
  return config


def claim(
  statement: str,
  metric: str,
  margin: float,
  higher_is_better: bool = True,
  baseline: str = 'plain',
  method: str = 'TWEO',
) -> dict:
  """Returns the claim that `method` is at least `margin` better than `baseline`."""
  return dict(
    statement=statement,
    metric=metric,
    baseline=baseline,
    method=method,
    margin=margin,
    higher_is_better=higher_is_better,
  )
