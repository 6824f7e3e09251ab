"""PRACTISE with ResNet-50 on ImageNet: one to three of twelve blocks dropped.

  python -m experiments.practise --config=imagenet_resnet50 --workdir=gs://...

Constants as for `imagenet_resnet34`. Adaptors stand behind the convolutions that write to the trunk; the
paper's code has them behind the 3x3 ones: `--config.last_conv=code`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.mir.imagenet_resnet34 import imagenet
from mlcollections_configs.practise import imagenet_resnet34


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_resnet34.get_config()
  config.network = imagenet('resnet50', 'resnet50.tv_in1k')
  return config
