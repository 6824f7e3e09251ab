"""Fashion-MNIST, 6000 images of which 20 a class have labels; some three minutes on two cores.

A small convolutional network. Needs the data set on disk (Debian's package `dataset-fashion-mnist`) or
prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.r2d2 import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data = dict(
    name='fashion_mnist',
    train_size=6000,
    train_options=dict(limit=6000),
    test_options=dict(limit=3000),
  )
  config.labeled.per_class = 20
  config.augment.padding = 2
  config.model.input_pool = 2
  config.supervised.batch_size = 40
  config.method.update(labeled_batch=32, rate=1000.0, repredict=(6, 8, 10, 12))
  config.decipher.update(epochs=14, batch_size=128)
  config.decipher.schedule.milestones = (6, 8, 10, 12)
  config.tuning.batch_size = 128
  return config
