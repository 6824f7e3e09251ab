"""ACSR with WRN-28-10 on CUB-200-2011, 5-way 1-shot (constants of the official code).

  python -m experiments.acsr --config=mlcollections_configs/acsr/cub.py --workdir=gs://...

100 base and 50 novel classes; all else as in `mini_imagenet.py`. Folders: `<root>/base`, `<root>/novel`. The
numbers of images are those of the usual split (base: every second class; [inferred]). S2M2_R, the
starting model, has 80.68 % at 1 shot and 90.85 % at 5.
"""

from ml_collections import ConfigDict

from mlcollections_configs.acsr import mini_imagenet


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = mini_imagenet.get_config()
  backbone = config.network.backbone
  backbone.data = mini_imagenet.images(84, 96, base=5885, novel=2953, root='data/cub')
  backbone.model.num_classes = 100
  backbone.epochs = 400  # as many images as in 60 epochs of mini-ImageNet
  return config
