"""Where images show several classes: two digits on a canvas, students with a fifth of the teacher's images.

Two stages, as in the paper: the layer before the classifier learns to mimic the features first, alone. Rows,
no claim.
"""

from ml_collections import ConfigDict

from mlcollections_configs.feature_mimicking import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.teacher = learner(1500, (32, 64), 128, epochs=20)
  config.student = learner(300, (8, 16), 32, epochs=60)
  config.align = embedded.recipe(20, batch_size=48, base=0.02)
  config.methods = embedded.methods(beta=0.5, where_right=False)
  config.log_every = 60
  config.claims = ()
  return config


def learner(images: int, widths: tuple[int, int], hidden: int, epochs: int) -> dict:
  """Returns a network and the canvases that it is trained on."""
  return dict(
    data=dict(name='digit_canvases', train_size=images, train_options=dict(length=images)),
    model=dict(name='convnet', widths=widths, input_pool=2, hidden=(hidden,)),
    recipe=embedded.recipe(epochs, batch_size=48),
  )
