"""MoCo v2 with ResNet-50 on ImageNet, 200 epochs (constants of the official code).

A queue of 65536 keys, eight groups of batch statistics with the keys shuffled among them, as on 8 GPUs.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ssl_baselines import imagenet_simsiam


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_simsiam.get_config()
  config.methods = ('moco',)
  config.model = dict(name='resnet50', norm_groups=8)
  config.heads = dict(hidden=2048, features=128)
  config.predictor_rate = None
  config.target = dict(momentum=0.999, queue_size=65536, temperature=0.2)
  config.recipe.update(epochs=200, batch_size=256)
  config.recipe.schedule.base = 0.03
  config.eval.probe = dict(
    name='sgd', options=dict(learning_rate=30.0, epochs=100, batch_size=256, milestones=(60, 80))
  )
  config.reported = 'ImageNet, ResNet-50: linear probe 67.5 % (200 epochs), 71.1 % (800).'
  return config
