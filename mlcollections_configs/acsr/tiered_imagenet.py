"""ACSR with WRN-28-10 on tiered-ImageNet, 5-way 1-shot. [inferred]: the paper has no such setting.

  python -m experiments.acsr --config=tiered_imagenet --workdir=gs://...

351 base and 160 novel classes (Ren et al. 2018); all else as in `mini_imagenet.py`. Stability is regularized
on 36 000 of the 448 695 base images, drawn once, which a chip holds in memory. ResNet-18 [inferred]:
`--config.model.name=resnet18`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.acsr import mini_imagenet


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = mini_imagenet.get_config()
  config.data = dict(name='tiered_imagenet')
  config.recipe.epochs = 30
  config.base.limit = 36000
  return config
