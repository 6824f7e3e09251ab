"""S3L by SimCLR with ResNet-18 on CUB-200 (constants of the official code).

Batch 512, learning rate 0.5 behind 10 epochs of linear warm-up from 0.01; the head has no batch norm, the
loss is multiplied by 0.1 / 0.07. Negatives are those of the whole batch, the authors' of one of four devices.
"""

from ml_collections import ConfigDict

from mlcollections_configs.s3l import cub_moco_resnet50


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = cub_moco_resnet50.get_config()
  config.ssl = 'simclr'
  config.model = dict(name='resnet18')
  config.target = dict(temperature=0.1)
  config.base_temperature = 0.07
  config.recipe['batch_size'] = 512
  config.recipe['schedule'] = dict(
    name='cosine_per_epoch', base=0.5, warmup_epochs=10, warmup_start=0.01
  )
  return config
