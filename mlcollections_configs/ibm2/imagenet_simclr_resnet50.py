"""IbM2 on ImageNet with pooled features (2048 channels) of SimCLR's ResNet-50.

  python -m experiments.ibm2 --config=imagenet_simclr_resnet50 \
    --config.backbone.weights=FILE.safetensors --workdir=DIR

Weights in torchvision's names as safetensors; those of MMSelfSup or solo-learn begin with `backbone.`
(`--config.backbone.prefix=`). Batch 512, 60 epochs; data and view as with DINO.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ibm2 import imagenet_dino_vit_small


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_dino_vit_small.get_config()
  config.backbone = dict(
    model=dict(name='resnet50'),
    prefix='backbone.',
    ignore=(r'fc\..*',),
    published='SimCLR, ResNet-50, of MMSelfSup or solo-learn',
  )
  config.batch_size = 512
  config.chunk_size = 64  # of 2048 channels
  config.search = dict(threshold_epochs=60)
  config.train = dict(epochs=60)
  return config
