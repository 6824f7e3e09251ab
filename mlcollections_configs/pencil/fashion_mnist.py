"""Half of the labels of 4000 images of Fashion-MNIST drawn anew; some two minutes on two cores.

Uniform draws of all ten classes, so that 55 % of the labels are right. A label logit moves by at most 2.3 an
epoch, 19 in all. Needs the data set on disk (Debian's package `dataset-fashion-mnist`) or prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.pencil import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data.update(
    name='fashion_mnist',
    train_size=4000,
    train_options=dict(limit=4000),
    test_options=dict(limit=4000),
  )
  config.model.input_pool = 2
  config.pencil.update(start=6, end=14)
  config.recipe.update(epochs=20, eval_every=62)
  # The rate falls once, in the middle of the last stage.
  config.recipe.schedule = dict(
    name='multistep', base=0.05, milestones=(17,), factor=0.1, staircase=True
  )
  config.runs = ('ce', 'pencil')
  config.log_every = 62
  return config
