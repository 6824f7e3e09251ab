"""US3L with ResNet-18 on ImageNet, 100 epochs (official code); groups decay apart from epoch 50 on.

Widths are drawn in steps of an eighth, so that all layers of a block round to the same share.
"""

from ml_collections import ConfigDict

from mlcollections_configs import views
from mlcollections_configs.us3l import cifar100_resnet18


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = cifar100_resnet18.get_config()
  config.data = dict(name='imagenet2012')
  config.augment = views.photographs()
  config.model = dict(name='resnet18')
  config.widths.augment = dict(kind='resized_crop', scale=(0.08, 1.0))
  config.group_decay = dict(decay=5e-5, alpha=0.05, warmup_epochs=50)
  config.recipe.update(epochs=100, batch_size=1024, precision='bfloat16')
  config.eval.probe.options = dict(learning_rate=30.0, epochs=100, batch_size=256)
  config.mesh = dict(data=-1)
  return config
