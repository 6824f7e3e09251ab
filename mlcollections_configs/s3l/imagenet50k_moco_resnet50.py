"""S3L by MoCo v2 with ResNet-50 on 50 000 images of ImageNet at 224 and at 112 pixels, fine-tuned on CUB-200.

Learning rate 0.3, 800 epochs, a queue of 32768 (constants of the official code); a batch of 256, as on all
of ImageNet.
"""

from ml_collections import ConfigDict

from mlcollections_configs.s3l import cub_moco_resnet50


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = cub_moco_resnet50.get_config()
  config.labels = config.data
  config.warm_up = None
  config.data = dict(name='imagenet2012')
  config.unlabeled = dict(total=50000)
  config.target.queue_size = 32768
  config.recipe['batch_size'] = 256
  config.recipe['schedule']['base'] = 0.3
  config.variants = (
    dict(name='224 px', stages=(dict(size=224),), role='baseline'),
    dict(name='112 px', stages=(dict(size=112),)),
  )
  return config
