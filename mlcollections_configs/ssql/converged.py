"""SSQL against SimSiam until neither gains any more, at equal steps and at equal compute; many minutes.

`embedded` stops early: twice its epochs still bring SimSiam far. Here both take four times its epochs, and
SimSiam also eight times, which is what the two passes of a step of SSQL cost.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ssql import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.recipe.epochs = 400
  config.checkpoint_every = 1000
  config.runs = ('base', 'ssql', 'base*2')
  equal_compute = (
    {**item, 'statement': f'{item["statement"]}, at equal compute', 'baseline': 'SimSiam 2x epochs'}
    for item in map(dict, config.claims)
  )
  config.claims = (*config.claims, *equal_compute)
  return config
