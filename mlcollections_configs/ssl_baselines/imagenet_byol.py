"""BYOL with ResNet-50 on ImageNet, 1000 epochs at batch 4096 (schedule as published, from memory).

The target's share rises from 0.996 to 1; the two views differ in blur and solarization.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ssl_baselines import imagenet_simsiam


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_simsiam.get_config()
  config.augment.update(scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1))
  config.views = (
    dict(blur_probability=1.0),
    dict(blur_probability=0.1, solarize_probability=0.2),
  )
  config.methods = ('byol',)
  config.model = dict(name='resnet50')
  config.heads = dict(hidden=4096, features=256, predictor=4096)
  config.predictor_rate = None
  config.target = dict(momentum=0.996, final=1.0)
  config.recipe.update(epochs=1000, batch_size=4096)
  config.recipe.optimizer = dict(name='lars', momentum=0.9, weight_decay=1.5e-6)
  config.recipe.schedule = dict(name='cosine', base=3.2, warmup_epochs=10)  # 0.2 x 4096 / 256
  config.reported = 'ImageNet, ResNet-50: linear probe 74.3 % (1000 epochs).'
  return config
