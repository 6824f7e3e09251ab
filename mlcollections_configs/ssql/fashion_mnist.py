"""SSQL against SimSiam on Fashion-MNIST at 28 pixels, at equal steps.

  python -m experiments.ssql --config=mlcollections_configs/ssql/fashion_mnist.py

The first 10240 training images, 10 epochs of 40 steps; needs the data set on disk (Debian's package
`dataset-fashion-mnist`) or prepared by TFDS. About a quarter of an hour on two CPU cores.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ssql import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  config.data = dict(
    name='fashion_mnist',
    train_split='train',
    test_split='test',
    train_options=dict(limit=10240),
    test_options=dict(limit=4000),
    train_size=10240,
    stored_image=(28, 28, 1),
    image_size=28,
    channels=1,
  )
  config.augment.update(scale=(0.2, 1.0), flip_probability=0.5, mean=0.286, std=0.353)
  config.batch_size = 256
  config.epochs = 10
  config.eval.calibration = 256
  config.claims = ()  # the methods hardly differ here: rows, no claim
  return config
