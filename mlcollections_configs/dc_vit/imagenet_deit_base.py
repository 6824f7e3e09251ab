"""DC-ViT with DeiT-B on ImageNet; else as `imagenet_vit_base`.

  python -m experiments.dc_vit --config=imagenet_deit_base --workdir=gs://...

The smoothness of the synthetic images has the power that the official code gives it for DeiT.
"""

from ml_collections import ConfigDict

from mlcollections_configs.dc_vit import imagenet_vit_base


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_vit_base.get_config()
  config.network = imagenet_vit_base.network('deit_base')
  config.synthesis.variation_power = 1.0
  config.reported = (
    'DeiT-B 81.80 %, with 16.6 % fewer operations 81.26 %, by dropping blocks 79.30 %.'
  )
  return config
