"""MiR with MobileNetV2 on ImageNet: 50, 100, 500 and 1000 images.

  python -m experiments.mir --config=imagenet_mobilenetv2 --workdir=gs://...

Half of the expanded channels of each block that keeps the shape. The weights are timm's (73.0 %), not
torchvision's of the paper (71.9 %), which are not in a format that is read here.
"""

from ml_collections import ConfigDict

from mlcollections_configs.mir import imagenet_resnet34


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_resnet34.get_config()
  config.network = imagenet_resnet34.imagenet('mobilenetv2_100', 'mobilenetv2_100.ra_in1k')
  return config
