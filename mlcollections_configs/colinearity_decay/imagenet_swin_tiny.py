"""Colinearity Decay with Swin-T on ImageNet, next to plain training and TWEO: 300 epochs at batch 1024.

  python -m experiments.colinearity_decay --config=imagenet_swin_tiny --workdir=gs://...

Recipe and data as for `imagenet_deit_small`, with Swin's warm-up. Swin-S:
`--config.network.model.name=swin_small_patch4_window7_224`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.colinearity_decay import imagenet_deit_small


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_deit_small.get_config()
  config.network.model = dict(name='swin_tiny_patch4_window7_224', drop_path=0.2)
  config.network.recipe.schedule.warmup_epochs = 20
  return config
