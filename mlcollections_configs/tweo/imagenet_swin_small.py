"""TWEO with Swin-S on ImageNet from scratch.

  python -m experiments.tweo --config=imagenet_swin_small --workdir=gs://...

Recipe and data as for `imagenet_vit_base`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.tweo import imagenet_vit_base


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_vit_base.get_config()
  config.network.model = dict(name='swin_small_patch4_window7_224', drop_path=0.3)
  config.reported = (
    'Top-1 82.7 without and 82.8 with TWEO; peak in training 6402 and 35, of the trained network 1758 '
    'and 18.'
  )
  return config
