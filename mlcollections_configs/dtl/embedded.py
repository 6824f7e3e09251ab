"""DTL on digits: a transformer of six blocks, trained on their classes, adapted to tasks of 1000 images each.

  python -m experiments.dtl

Digits on 16x16 canvases, in patches of 4x4: 17 tokens of 64 channels. Memory is counted for 28x28 pixels, 50
tokens. All rows have the same epochs, batches, schedule and weight decay.
"""

from ml_collections import ConfigDict

from mlcollections_configs import adaptation


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.network = adaptation.derived_network()
  config.target = adaptation.derived_targets()
  config.tasks = ('texture', 'noise', 'rotation', 'count')
  config.recipe = adaptation.recipe(12, 2, base=3e-3)
  config.runs = ('linear', 'lora', 'full', 'dtl', 'dtl_plus')
  config.accounted = dict(image_size=28, batch_size=32)
  return config
