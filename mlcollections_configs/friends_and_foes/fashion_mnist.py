"""Seven classes of Fashion-MNIST, unequal, 30 % of labels moved, a fifth of the images of the other three.

Some minutes on two cores. Largest class 600 images, smallest 120; clean test images of the seven classes.
Adam without augmentation or weight decay, under which plain training memorizes wrong labels.
Needs the data set on disk (Debian's package `dataset-fashion-mnist`) or prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.friends_and_foes import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  classes = (0, 1, 2, 3, 4, 5, 6)
  config.data = dict(
    name='fashion_mnist', num_classes=7, train_size=42000,
    train_options=dict(classes=classes), test_options=dict(classes=classes),
    open=dict(
      name='fashion_mnist', train_options=dict(classes=(7, 8, 9)), closed_rate=0.3, open_rate=0.2,
      max_count=600, imbalance=5.0,
    ),
  )  # fmt: skip
  config.augment = dict(kind='none')
  config.model.input_pool = 2
  config.ssl = embedded.simsiam(10, 0.05)
  config.warmup.batch_size = 64
  config.recipe = dict(
    epochs=15, batch_size=64, optimizer=dict(name='adam'), schedule=dict(name='constant', base=1e-3),
    eval_every=32,
  )  # fmt: skip
  config.runs = ('ce', 'ff', 'semi')
  config.log_every = 32
  return config
