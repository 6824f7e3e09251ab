"""IbM2 on ImageNet with pooled features (2048 channels) of BYOL's ResNet-50.

  python -m experiments.ibm2 --config=mlcollections_configs/ibm2/imagenet_byol_resnet50.py \
    --config.model.weights=FILE.safetensors --workdir=DIR

Weights in torchvision's names as safetensors; those of MMSelfSup or solo-learn begin with `backbone.`
(`--config.model.prefix=`). Batch 512, 60 epochs; data and view as with DINO.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ibm2 import imagenet_dino_vit_small


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = imagenet_dino_vit_small.get_config()
  imagenet_dino_vit_small.resnet50(config, prefix='backbone.')
  return config
