"""IbM2 on CUB-200-2011, 200-way with 1 to 16 images per class, features of DINO's ViT-S/16.

  python -m experiments.ibm2 --config=cub_dino_vit_small \
    --config.backbone.weights=model.safetensors --workdir=DIR

The official split. Prepare the data once: `tfds build caltech_birds2011 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ibm2 import imagenet_dino_vit_small


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_dino_vit_small.get_config()
  config.data = dict(name='caltech_birds2011', **imagenet_dino_vit_small.VIEW)
  return config
