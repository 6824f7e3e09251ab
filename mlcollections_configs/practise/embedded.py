"""PRACTISE on a small ResNet of pasted digits: three of nine blocks dropped with 100 images.

  python -m experiments.practise

Each of 1297 training digits lies at four random places and scales on a plain 16x16 canvas. Three stages of
four basic blocks, 8, 16 and 32 channels wide. What a block saves is counted in multiply-accumulates: times
of so small a network are noise.
"""

from ml_collections import ConfigDict

from mlcollections_configs.mir.embedded import digits


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.network = digits(blocks=4)
  config.totals = (100,)
  config.augment = config.network['augment']
  config.counts = (3,)
  config.recovery = dict(steps=100)
  config.tuning = dict(steps=200)
  config.price = 'macs'
  config.runs = ('practise', 'worst', 'labels', 'untuned', 'filters')
  config.label_rate = 1e-4
  config.claims = claims(3, 100)
  config.reported = (
    'ImageNet, ResNet-34 with 22 % less latency: about 7 points above earlier methods on average. Dropped '
    'are layer1.1 and layer1.2 for two blocks, and one of layer2 besides for three.'
  )
  return config


def claims(count: int, total: int) -> tuple:
  """Returns the claims about `count` blocks and `total` images."""
  own = f'accuracy_{count}_{total}'
  found = [
    ('recoverability orders blocks by the accuracy that they cost (Spearman)', 'rank_correlation',
     'any order', 'recoverability', 0.5),
    ('at least a point above the dearest blocks', own, 'dearest blocks', 'PRACTISE', 1.0),
    ('above labels', own, 'PRACTISE, labels (BP)', 'PRACTISE', 1.0),
    ('not below filters that save as much', own, 'filters, mimicking', 'PRACTISE', 0.0),
    ('within 3 points of the whole network', own, 'whole', 'PRACTISE', -3.0),
  ]  # fmt: skip
  names = ('statement', 'metric', 'baseline', 'method', 'margin')
  return tuple(dict(zip(names, own)) for own in found)
