"""UP-DeiT-S: DeiT-B cut to the shape of DeiT-S; else as `imagenet_deit_tiny`.

  python -m experiments.up_vits --config=imagenet_deit_small --workdir=gs://...

384 channels with 6 heads and 1536 hidden channels are left.
"""

from ml_collections import ConfigDict

from mlcollections_configs.up_vits import imagenet_deit_tiny


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_deit_tiny.get_config()
  config.target.name = 'deit_small_patch16_224'
  return config
