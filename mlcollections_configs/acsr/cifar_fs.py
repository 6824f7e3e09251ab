"""ACSR with WRN-28-10 on CIFAR-FS, 5-way 1-shot (constants of the official code).

  python -m experiments.acsr --config=mlcollections_configs/acsr/cifar_fs.py --workdir=gs://...

32x32 images, brought to 36 pixels (1.15 * 32); normalized with ImageNet's mean and deviation, as in the
official code. 64 base and 20 novel classes of 600 images; all else as in `mini_imagenet.py`. S2M2_R, the
starting model, has 74.81 % at 1 shot and 87.47 % at 5. ResNet-18 [inferred]:
`--config.network.backbone.model.name=cifar_resnet18`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.acsr import mini_imagenet


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = mini_imagenet.get_config()
  config.network.backbone.data = mini_imagenet.images(
    32, 36, base=64 * 600, novel=20 * 600, root='data/cifar_fs'
  )
  return config
