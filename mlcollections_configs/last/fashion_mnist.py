"""LAST on Fashion-MNIST: a transformer trained on the classes of clothes, adapted to tasks of 1000 images.

  python -m experiments.last --config=fashion_mnist

28x28 pixels in patches of 4x4: 50 tokens of 64 channels. Four modules a block and the other rows of the
ablation: `--config.side.modules=4 --config.runs=linear,last,remat,after,full_rank`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import adaptation
from mlcollections_configs.last import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.network = adaptation.derived_network('fashion_tasks', 28)
  config.target = adaptation.derived_targets('fashion_tasks', 28)
  return config
