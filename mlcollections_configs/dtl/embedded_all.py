"""Every way to adapt a frozen network on every derived task: eleven rows, six tasks.

  python -m experiments.dtl --config=embedded_all

Network, recipe and learning rate are those of `embedded`, for all rows: 66 trainings where that has 10.
"""

from ml_collections import ConfigDict

from mlcollections_configs.dtl import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.tasks = ('texture', 'noise', 'rotation', 'count', 'quadrant', 'size')
  config.runs = (
    'linear', 'bitfit', 'vpt_shallow', 'vpt_deep', 'ssf', 'adapter', 'adaptformer', 'lora', 'full', 'dtl',
    'dtl_plus',
  )  # fmt: skip
  config.claims = config.claims[:1]
  return config
