"""MiR on a ResNet of Fashion-MNIST: half of the filters within its blocks removed, 50 and 200 images.

python -m experiments.mir --config=fashion_mnist
"""

from ml_collections import ConfigDict

from mlcollections_configs.mir import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.network = fashion()
  config.augment = config.network['augment']
  return config


def fashion(blocks: int = 2, epochs: int = 4) -> dict:
  """Returns a ResNet of three stages of the 60000 training images of Fashion-MNIST."""
  return dict(
    data=dict(name='fashion_mnist', test_options=dict(limit=4000)),
    augment=dict(kind='pad_crop', padding=2),
    **embedded.resnet((2, 2, 2), blocks, epochs, 128),
  )
