"""mWh, mixup at all times and none, with two alphas, on 3000 images of Fashion-MNIST; minutes on two cores.

Tested on 4000 others. Images are averaged to 14x14 pixels before two convolutions and a hidden layer; 15
epochs of 46 steps, batches counted (the paper's form). Nothing else is augmented. Needs the data set
on disk (Debian's package `dataset-fashion-mnist`) or prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.mwh import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.network.data = dict(
    name='fashion_mnist',
    train_size=3000,
    train_options=dict(limit=3000),
    test_options=dict(limit=4000),
  )
  config.network.model.input_pool = 2
  config.network.recipe.update(epochs=15, eval_every=92)
  config.log_every = 92
  config.checkpoint_every = 345
  return config
