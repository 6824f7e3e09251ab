"""QFD with Swin-T on ImageNet: all layers of attention and MLP with 4 bits.

  python -m experiments.qfd --config=imagenet_swin_tiny --workdir=gs://...

Recipe as for `imagenet_deit_small`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.qfd import imagenet_deit_small, imagenet_resnet18


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_deit_small.get_config()
  config.network = imagenet_resnet18.network('swin_tiny')
  return config
