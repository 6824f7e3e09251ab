"""PENCIL where images show several classes: canvases of two digits, a seventh of all labels wrong; minutes.

Each class is a label with two outcomes, drawn anew with a chance of 0.3; each looks at places of its own
(`models.ClassAttention`). All of this is inferred from a sentence of the journal version: rows, no claim.
"""

from ml_collections import ConfigDict

from mlcollections_configs.pencil import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data = dict(name='digit_canvases', noise=dict(kind='symmetric', rate=0.3))
  config.model = dict(name='convnet', widths=(16, 32, 32), pools=(2, 2, 1), hidden=())
  config.class_attention = True
  config.pencil = dict(start=20, end=50, alpha=0.1, beta=0.4, rate=1280.0)
  config.recipe.update(epochs=60, eval_every=46)
  config.recipe.schedule = embedded.schedule((20, 50, 60), 0.05, 0.05)
  config.runs = ('ce', 'pencil')
  config.log_every = 46
  config.claims = ()
  config.reported = ''
  return config
