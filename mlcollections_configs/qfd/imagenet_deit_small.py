"""QFD with DeiT-S on ImageNet: all layers of attention and MLP with 4 bits.

  python -m experiments.qfd --config=imagenet_deit_small --workdir=gs://...

How the paper trains transformers is not known: AdamW at 1e-4, the other constants as for `imagenet_resnet18`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.qfd import imagenet_resnet18


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_resnet18.get_config()
  config.network = imagenet_resnet18.network('deit_small')
  config.bits = ('4w4a',)
  config.rows = ('baseline',)
  for recipe in (config.recipe, config.teacher):
    recipe.optimizer = dict(name='adamw', weight_decay=0.05)
    recipe.schedule = dict(name='cosine', base=1e-4)
  return config
