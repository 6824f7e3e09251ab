"""45 % of the labels of 3000 images of Fashion-MNIST moved to another class; some minutes on two cores.

14 epochs of Adam without augmentation, clean test images. Needs the data set on disk (Debian's package
`dataset-fashion-mnist`) or prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.peer_learning import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data.update(
    name='fashion_mnist',
    train_size=3000,
    train_options=dict(limit=3000),
    test_options=dict(limit=2000),
  )
  config.model.input_pool = 2
  config.recipe.update(epochs=14, eval_every=46)
  config.log_every = 46
  return config
