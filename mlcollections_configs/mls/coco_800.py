"""MLS with ResNet-50 on COCO's training images for 800 epochs; all else as in `coco_400`."""

from ml_collections import ConfigDict

from mlcollections_configs.mls import coco_400


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = coco_400.get_config()
  config.recipe.epochs = 800
  config.reported = (
    'COCO, ResNet-50, 800 epochs: Mask R-CNN (FPN) box / mask AP 40.5 / 36.5 against MoCo v2 38.5 / 34.8; '
    'VOC0712 Faster R-CNN AP 55.0 against 53.7. No probe of COCO classes.'
  )
  return config
