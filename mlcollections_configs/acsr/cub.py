"""ACSR with WRN-28-10 on CUB-200-2011, 5-way 1-shot (constants of the official code).

  python -m experiments.acsr --config=cub --workdir=gs://...

100 base and 50 novel classes, in folders below `data/cub/base` and `data/cub/novel`; all else as in
`mini_imagenet.py`. The numbers of images are those of the usual split (base: every second class;
[inferred]). S2M2_R, the starting model, has 80.68 % at 1 shot and 90.85 % at 5.
"""

from ml_collections import ConfigDict

from mlcollections_configs.acsr import mini_imagenet


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = mini_imagenet.get_config()
  config.data = dict(name='cub')
  config.recipe.epochs = 400  # as many images as in 60 epochs of mini-ImageNet
  return config
