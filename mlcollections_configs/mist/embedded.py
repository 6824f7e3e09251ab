"""MIST on digits: a transformer of four blocks stays in the cloud, a device adapts it to 1000 images a task.

  python -m experiments.mist

Digits on 16x16 canvases, in patches of 4x4: 17 tokens of 64 channels. All rows have the same epochs,
batches, schedule, learning rate and weight decay. What a step keeps is counted for six blocks and 28x28
pixels: 50 tokens.
"""

from ml_collections import ConfigDict

from mlcollections_configs import adaptation


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.network = adaptation.derived_network()
  config.target = adaptation.derived_targets()
  config.tasks = ('rotation', 'count')
  config.recipe = adaptation.recipe(6, 2, base=3e-3)
  config.edge = dict(rank=8, depth=2)
  config.reference = dict(rank=4, modules=1)
  config.runs = ('linear', 'all_layers', 'last_layer', 'mlp', 'mist', 'mist_float16')
  config.accounted = dict(depth=6, mlp_ratio=4.0, image_size=28, batch_size=32)
  config.timed = 20

  config.claims = (
    claim('the sum of all layers at least 2 points above the last layer', 'attention on the last layer', 2.0),
    claim('at least 5 points above the linear probe', 'linear probe', 5.0),
    claim('no more than 3 points below an MLP of as many numbers', 'MLP on the sum', -3.0),
    claim('no more than 5 points below a side network given every layer', 'attention on every layer', -5.0),
    claim('sent in float16: no more than 1 point below', 'MIST', -1.0, method='MIST, float16'),
  )  # fmt: skip
  return config


def claim(statement: str, baseline: str, margin: float, method: str = 'MIST') -> dict:
  """Returns the claim about structured tasks that `method` is at least `margin` better than `baseline`."""
  return dict(
    statement=statement, metric='structured', baseline=baseline, method=method, margin=margin
  )
