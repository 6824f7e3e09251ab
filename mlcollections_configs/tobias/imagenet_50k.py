"""MoCo v2 with Tobias, ResNet-50 on 50000 images of ImageNet, 200 epochs; a queue of 32768 keys."""

from ml_collections import ConfigDict

from mlcollections_configs.tobias import imagenet_10k


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_10k.get_config()
  config.data.update(train_split='train[:50000]', train_size=50000)
  config.target.queue_size = 32768
  config.log_every = 195
  config.checkpoint_every = 3900
  return config
