"""ACSR with WRN-28-10 on tiered-ImageNet, 5-way 1-shot. [inferred]: the paper has no such setting.

  python -m experiments.acsr --config=mlcollections_configs/acsr/tiered_imagenet.py --workdir=gs://...

351 base and 160 novel classes (Ren et al. 2018); all else as in `mini_imagenet.py`. Stability is regularized
on 36 000 of the 448 695 base images, drawn once, which a chip holds in memory. ResNet-18 [inferred]:
`--config.network.backbone.model.name=resnet18`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.acsr import mini_imagenet


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = mini_imagenet.get_config()
  backbone = config.network.backbone
  backbone.data = mini_imagenet.images(
    84, 96, base=448695, novel=206209, root='data/tiered_imagenet'
  )
  backbone.model.num_classes = 351
  backbone.epochs = 30
  config.base_limit = 36000
  return config
