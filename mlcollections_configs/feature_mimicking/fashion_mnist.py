"""A teacher of 10000 images of Fashion-MNIST and four times narrower students of 1000; minutes on two cores.

Images are averaged to 14x14 pixels first, and shifted by up to two pixels and flipped in training. Needs the
data set on disk (Debian's package `dataset-fashion-mnist`) or prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.feature_mimicking import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.teacher = learner(10000, (32, 64), 128, epochs=8)
  config.student = learner(1000, (8, 16), 32, epochs=30)
  config.log_every = 150
  return config


def learner(images: int, widths: tuple[int, int], hidden: int, epochs: int) -> dict:
  """Returns a network and the first images that it is trained on."""
  return dict(
    data=dict(
      name='fashion_mnist',
      train_size=images,
      train_options=dict(limit=images),
      test_options=dict(limit=4000),
    ),
    augment=dict(kind='pad_crop', padding=2),
    model=dict(name='convnet', widths=widths, input_pool=2, hidden=(hidden,)),
    recipe=embedded.recipe(epochs),
  )
