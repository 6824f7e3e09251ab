"""IDMM with DeiT-Tiny on SIN-10k, ten images of each class of ImageNet: a start for other small sets.

Photographs as folders of classes, `data/sin10k/train/CLASS/*.JPEG`, and ImageNet's validation images in
`data/sin10k/test`. The weights below `idmm/images` in the work directory are what the paper fine-tunes on
other sets.
"""

from ml_collections import ConfigDict

from mlcollections_configs.idmm import dtd_deit_tiny


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = dtd_deit_tiny.get_config()
  config.data.update(num_classes=1000, train_size=10000)
  config.data.train_options.root = 'data/sin10k'
  config.data.test_options.root = 'data/sin10k'
  return config
