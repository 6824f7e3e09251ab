"""Single-branch learning with MobileNetV2 on ImageNet: a small network, for which the method is made.

As `imagenet_resnet50`. EfficientNet: `--config.model.name=efficientnet_b0`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.efficient_ssl import imagenet_resnet50


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_resnet50.get_config()
  config.model = dict(name='mobilenetv2_100')
  return config
