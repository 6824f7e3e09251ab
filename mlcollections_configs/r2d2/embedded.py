"""Digits with 5 labels a class: supervised training, D2 and R2-D2; a minute on two cores.

A small convolutional network. The pseudo-labels' step of 0.78 on the difference from the predictions, the
parts of a batch and the order of stages are the paper's; lengths and learning rates are made for small data.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='digits')
  config.labeled = dict(per_class=5)
  config.augment = dict(kind='pad_crop', padding=1, fill='reflect', flip=False)
  config.model = dict(name='convnet', widths=(16, 32), hidden=(128,))
  sgd = dict(name='sgd', momentum=0.9, nesterov=True, weight_decay=2e-4)
  config.supervised = dict(
    epochs=60, batch_size=24, optimizer=sgd, schedule=dict(base=0.05, decay_epochs=70)
  )
  config.method = dict(labeled_batch=16, repredict=(12, 16, 20, 24), rate=500.0)
  config.decipher = dict(
    epochs=28,
    batch_size=64,
    optimizer=sgd,
    schedule=schedule((12, 16, 20, 24), (0.05, 0.05, 0.03, 0.015, 0.003)),
  )
  config.tuning = dict(epochs=3, batch_size=64, optimizer=sgd, schedule=dict(base=0.005))
  config.runs = ('supervised', 'longer', 'd2', 'r2d2')
  config.claims = claims()
  config.reported = (
    'CIFAR-10 with 4000 labels, Shake-Shake-26: error 5.72 %; CIFAR-100 with 10000 labels: 32.87 %; SVHN '
    'with 1000 labels: 3.64 % (all from secondary sources).'
  )
  return config


def claims() -> tuple[dict, ...]:
  """Returns the claims."""
  both = dict(baseline='D2', method='R2-D2')
  return (
    dict(
      statement='accuracy at least 0.8 points above supervised training', metric='accuracy', margin=0.8,
      baseline='Supervised', method='R2-D2',
    ),
    dict(
      statement='accuracy at most 0.3 points below D2', metric='accuracy', margin=-0.3, **both
    ),
    dict(
      statement='the first reprediction takes at least 20 % of the entropy', metric='drop', margin=20.0,
      **both,
    ),
    dict(
      statement='in the epoch behind it entropy rises, more than in the same epoch of D2', metric='rise',
      margin=0.0, **both,
    ),
    dict(
      statement='the last entropy is below 0.8 of that of D2', metric='relative_entropy', margin=20.0,
      higher_is_better=False, **both,
    ),
  )  # fmt: skip


def schedule(milestones: tuple[int, ...], rates: tuple[float, ...]) -> dict:
  """Returns the fields of a learning rate of steps: the first of `rates`, the next from each milestone on."""
  factors = tuple(rates[i] / rates[i - 1] for i in range(1, len(rates)))
  return {
    'name': 'multistep', 'base': rates[0], 'milestones': milestones, 'factor': factors
  }  # fmt: skip
