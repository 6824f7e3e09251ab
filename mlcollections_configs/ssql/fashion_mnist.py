"""SSQL against SimSiam on Fashion-MNIST at 28 pixels, at equal steps; a quarter of an hour on two cores.

The first 10240 training images, 10 epochs of 40 steps. Needs the data set on disk (Debian's package
`dataset-fashion-mnist`) or prepared by TFDS. The methods hardly differ here: rows, no claim.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ssql import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data = dict(
    name='fashion_mnist',
    train_size=10240,
    train_options=dict(limit=10240),
    test_options=dict(limit=4000),
  )
  config.augment.update(scale=(0.2, 1.0), flip_probability=0.5)
  config.recipe.update(epochs=10, batch_size=256)
  config.claims = ()
  return config
