"""PRACTISE with MobileNetV2 on ImageNet: one or two blocks dropped with 500 images.

  python -m experiments.practise --config=imagenet_mobilenetv2 --workdir=gs://...

Constants as for `imagenet_resnet34`. The weights are timm's (73.0 %), not torchvision's of the paper
(71.9 %), which are not in a format that is read here.
"""

from ml_collections import ConfigDict

from mlcollections_configs.mir.imagenet_resnet34 import imagenet
from mlcollections_configs.practise import embedded, imagenet_resnet34


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_resnet34.get_config()
  config.network = imagenet('mobilenetv2_100', 'mobilenetv2_100.ra_in1k')
  config.totals = (500,)
  config.counts = (1, 2)
  config.claims = embedded.claims(2, 500)
  return config
