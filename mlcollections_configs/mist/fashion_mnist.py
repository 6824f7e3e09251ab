"""MIST on Fashion-MNIST: a transformer trained on the classes of clothes, a device with tasks of 1000 images.

  python -m experiments.mist --config=fashion_mnist

28x28 pixels in patches of 4x4: 50 tokens of 64 channels.
"""

from ml_collections import ConfigDict

from mlcollections_configs import adaptation
from mlcollections_configs.mist import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.network = adaptation.derived_network('fashion_tasks', 28)
  config.target = adaptation.derived_targets('fashion_tasks', 28)
  return config
