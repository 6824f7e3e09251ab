"""CURL on a small bottleneck ResNet of Fashion-MNIST, of which 1000 images are left; minutes on two cores.

The network sees 10240 training images. Needs the data set on disk (Debian's package `dataset-fashion-mnist`)
or prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.curl import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.network = dict(
    data=dict(
      name='fashion_mnist',
      train_options=dict(limit=10240),
      test_options=dict(limit=4000),
      train_size=10240,
    ),
    augment=dict(kind='pad_crop', padding=2),
    **embedded.resnet(epochs=8, batch_size=128),
  )
  config.network.model.strides = (2, 2, 2)
  config.limited = dict(total=1000)
  config.augment = config.network['augment']
  config.recipe = embedded.tuning(epochs=24, base=0.01, warmup_epochs=2)
  config.refinement = dict(
    recipe=embedded.tuning(epochs=4, base=1e-4), augment=config.network['augment']
  )
  return config
