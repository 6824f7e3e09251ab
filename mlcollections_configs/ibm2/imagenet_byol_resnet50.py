"""IbM2 on ImageNet with pooled features (2048 channels) of BYOL's ResNet-50.

  python -m experiments.ibm2 --config=imagenet_byol_resnet50 \
    --config.backbone.weights=FILE.safetensors --workdir=DIR

Weights in torchvision's names as safetensors; those of MMSelfSup or solo-learn begin with `backbone.`
(`--config.backbone.prefix=`). All else as with SimCLR.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ibm2 import imagenet_simclr_resnet50


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_simclr_resnet50.get_config()
  config.backbone.published = 'BYOL, ResNet-50, of MMSelfSup or solo-learn'
  return config
