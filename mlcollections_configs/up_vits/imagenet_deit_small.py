"""UP-DeiT-S: DeiT-B cut to the shape of DeiT-S (384 channels, 6 heads, 1536 hidden); else as `imagenet_deit_tiny`.

  python -m experiments.up_vits --config=imagenet_deit_small --workdir=gs://...
"""

from ml_collections import ConfigDict

from mlcollections_configs.up_vits import imagenet_deit_tiny


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_deit_tiny.get_config()
  config.target.name = 'deit_small_patch16_224'
  return config
