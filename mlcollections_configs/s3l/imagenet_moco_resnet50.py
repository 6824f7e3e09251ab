"""S3L by MoCo v2 with ResNet-50 on ImageNet, fine-tuned on CUB-200: 224 pixels, 112, and 112 and then 224.

Learning rate 0.03, batch 256, 200 epochs and 50 more in the second stage, a queue of 65536 (constants of the
official code, budgets by the names of its checkpoints).
"""

from ml_collections import ConfigDict

from mlcollections_configs.s3l import cub_moco_resnet50


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = cub_moco_resnet50.get_config()
  config.labels = config.data
  config.warm_up = None
  config.data = dict(name='imagenet2012')
  config.target.queue_size = 65536
  config.recipe.update(epochs=200, batch_size=256)
  half = dict(size=112)
  config.variants = (
    dict(name='224 px', stages=(dict(size=224),), role='baseline'),
    dict(name='112 px', stages=(half,)),
    dict(name='112, then 224 px', stages=(half, dict(size=224, epochs=50))),
  )
  return config
