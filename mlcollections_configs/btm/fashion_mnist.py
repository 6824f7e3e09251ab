"""BTM on long-tailed Fashion-MNIST (500 to 5 images a class) with a small residual network.

Batch statistics are merged with the parameters. A subset has 93 images; at batch 32 an epoch of the
fine-tuning is two steps. Needs the data set on disk (Debian's package `dataset-fashion-mnist`) or prepared by
TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.btm import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data = dict(
    name='fashion_mnist', imbalance=dict(kind='exponential', max_count=500, ratio=100.0)
  )
  config.groups = dict(many=100, few=20)
  config.augment = dict(kind='pad_crop', padding=2, flip=False)
  config.model = dict(name='cifar_resnet18', stage_sizes=(1, 1, 1), strides=(2, 2, 2), width=16)
  config.network.update(epochs=40, batch_size=64)
  config.fine_tuning.update(epochs=40, batch_size=32)
  config.crt.update(epochs=20, batch_size=64)
  config.second.update(epochs=20, batch_size=64)
  # Convolutions with kernels of their own a run are slow on a CPU.
  config.merging = dict(count=6, cap=10, vmapped=False)
  return config
