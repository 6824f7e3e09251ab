"""BTM on long-tailed Fashion-MNIST (500 to 5 images a class) with a small residual network.

  python -m experiments.btm --config=mlcollections_configs/btm/fashion_mnist.py

Batch statistics are merged with the parameters. A subset has 93 images; at batch 32 an epoch of the
fine-tuning is two steps. Needs the data set on disk (Debian's package `dataset-fashion-mnist`) or prepared by
TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs import long_tail
from mlcollections_configs.btm import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  long_tail.set_fashion_mnist(config)
  config.augment = dict(kind='pad_crop', padding=2, flip=False)
  first, fine_tuning = long_tail.recipe(40, 64, 0.1, 5e-4), long_tail.recipe(40, 32, 0.02, 5e-4)
  second = long_tail.recipe(20, 64, 0.1, 5e-4, 'cosine_per_epoch')
  long_tail.set_stages(
    config,
    embedded.first_stages(first, fine_tuning, cap=10)
    | embedded.classifier_stages(long_tail.recipe(20, 64, 0.1, 5e-4))
    | embedded.second_stages(second, factor=0.2, head=0.3, tail=0.0),
  )
  config.merged.vmapped = False  # convolutions with kernels of their own a run are slow on a CPU
  return config
