"""BTM on ImageNet-LT with ResNet-50, the paper's setting (constants of the official code).

180 epochs at batch 256 with mixup (alpha 0.2), then ten times the same on balanced subsets of at most 10
images a class from the trained network, the merge, and MiSLAS' second stage for 10 epochs. To beat: MiSLAS,
52.7 % (its first stage 45.5 %).
"""

from ml_collections import ConfigDict

from mlcollections_configs.btm import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='ImageNet_LT')
  config.groups = dict(boundaries=(390, 835))
  config.augment = dict(kind='resized_crop', scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0.0))
  config.model = dict(name='resnet50')

  sgd = dict(name='sgd', momentum=0.9, weight_decay=5e-4)
  stairs = dict(name='cosine_per_epoch', base=0.1)
  config.network = dict(epochs=180, batch_size=256, optimizer=sgd, schedule=stairs, mixup=0.2)
  config.fine_tuning = config.network.copy_and_resolve_references()
  config.merging = dict(count=10, cap=10)
  config.second = dict(
    epochs=10, batch_size=256, optimizer=sgd | embedded.scaling(0.05), schedule=stairs
  )
  config.smoothing = dict(head=0.3, tail=0.0)
  config.runs = ('stage1', 'balanced', 'las_stage1', 'las_merged')

  config.checkpoint_every = 5000
  config.pictured = ('CE + mixup', 'merged', 'merged + LAS')
  return config
