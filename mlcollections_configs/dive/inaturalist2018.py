"""DiVE on iNaturalist 2018 with ResNet-50.

90 epochs (as quoted; 200 for the longer training), batch 256, SGD with weight decay 1e-4 and a learning rate
of 0.1 along a cosine: the usual ones, the paper's are not published. DiVE is quoted with 71.7 %.
"""

from ml_collections import ConfigDict

from mlcollections_configs.dive import imagenet_lt


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_lt.get_config()
  config.data = dict(name='iNaturalist18')
  config.model = dict(name='resnet50')
  config.network.optimizer.weight_decay = 1e-4
  return config
