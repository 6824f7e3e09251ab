"""IbM2 on the public 1 % of ImageNet (about 13 images per class), features of DINO's ViT-S/16; one run.

  python -m experiments.ibm2 --config=imagenet_1percent_dino_vit_small \
    --config.backbone.weights=model.safetensors --workdir=DIR

Prepare the data once: `tfds build imagenet2012_subset/1pct --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ibm2 import imagenet_dino_vit_small


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_dino_vit_small.get_config()
  config.data = dict(name='imagenet2012_subset/1pct', **imagenet_dino_vit_small.VIEW)
  config.shots = (0,)
  config.draws = 1
  return config
