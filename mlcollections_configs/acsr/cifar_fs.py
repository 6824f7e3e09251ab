"""ACSR with WRN-28-10 on CIFAR-FS, 5-way 1-shot (constants of the official code).

  python -m experiments.acsr --config=cifar_fs --workdir=gs://...

32x32 images, brought to 36 pixels (1.15 * 32); normalized with ImageNet's mean and deviation, as in the
official code. 64 base and 20 novel classes of 600 images; all else as in `mini_imagenet.py`. S2M2_R, the
starting model, has 74.81 % at 1 shot and 87.47 % at 5. ResNet-18 [inferred]:
`--config.model.name=cifar_resnet18`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.acsr import mini_imagenet


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = mini_imagenet.get_config()
  config.data = dict(name='cifar_fs')
  return config
