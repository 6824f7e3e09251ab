"""MiR with ResNet-50 on ImageNet: 50, 100, 500 and 1000 images.

  python -m experiments.mir --config=imagenet_resnet50 --workdir=gs://...

Half of the filters of the 3x3 convolution in each block around an identity. `layer1_0`, whose shortcut is a
projection though its stride is 1, stays whole; the default of the third party's code that the share of half
is known from prunes it, too.
"""

from ml_collections import ConfigDict

from mlcollections_configs.mir import imagenet_resnet34


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_resnet34.get_config()
  config.network = imagenet_resnet34.imagenet('resnet50', 'resnet50.tv_in1k')
  return config
