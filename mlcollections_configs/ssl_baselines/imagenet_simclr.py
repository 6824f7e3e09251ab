"""SimCLR with ResNet-50 on ImageNet, 1000 epochs at batch 4096 (constants of the paper).

Negatives are those of the global batch. The projector has a batch norm inside; LARS, 0.3 x 4096 / 256.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ssl_baselines import imagenet_simsiam


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_simsiam.get_config()
  config.augment.update(scale=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2))
  config.methods = ('simclr',)
  config.model = dict(name='resnet50')
  config.heads = dict(hidden=2048, features=128)
  config.predictor_rate = None
  config.target = dict(temperature=0.1)
  config.recipe.update(epochs=1000, batch_size=4096)
  config.recipe.optimizer = dict(name='lars', momentum=0.9, weight_decay=1e-6)
  config.recipe.schedule = dict(name='cosine', base=4.8, warmup_epochs=10)
  config.reported = 'ImageNet, ResNet-50: linear probe 69.3 % (1000 epochs).'
  return config
