"""mWh, mixup at all times and none, with two alphas, on digits at random places; some minutes on two cores.

1297 training digits, each at a random place and scale of a canvas of 16x16 pixels, and three canvases of each
of 500 others for the test. A small convolutional network, 30 epochs of 20 steps, batches counted (the paper's
form). Nothing else is augmented.
"""

from ml_collections import ConfigDict

_NAMES = {'none': 'none', 'always': 'mixup', 'mwh': 'mWh', 'reverse_mwh': 'reverse'}


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.network = dict(
    data=dict(name='pasted_digits', test_options=dict(pastes=3)),
    model=dict(name='convnet', widths=(16, 32), hidden=(128,)),
    recipe=dict(
      epochs=30,
      batch_size=64,
      optimizer=dict(name='sgd', momentum=0.9, weight_decay=5e-4),
      schedule=dict(name='cosine', base=0.1),
      eval_every=100,
    ),
  )
  config.mixing = rows()
  config.log_every = 100
  config.checkpoint_every = 300
  config.claims = claims()
  config.pictured = ('none', 'mixup, alpha 0.5', 'mWh, alpha 0.5', 'reverse, alpha 0.5')
  config.reported = (
    'CIFAR-100, 100 epochs, alpha 0.5: PreAct ResNet-18 77.00 % (mixup 75.27), DenseNet-161 79.94 (78.71), '
    'WRN-28-10 79.94 (78.86); no search for alpha is needed.'
  )
  return config


def rows(granularity: str = 'batch') -> dict:
  """Returns the rows: mixup by schedule and alpha, and CutMix."""
  found = dict(none=dict(title='none', schedule='none'))
  for schedule, alpha in (
    ('always', 0.5), ('mwh', 0.5), ('always', 2.0), ('mwh', 2.0), ('reverse_mwh', 0.5)
  ):  # fmt: skip
    name, title = f'{schedule}_{alpha:g}'.replace('.', ''), f'{_NAMES[schedule]}, alpha {alpha:g}'
    found[name] = dict(title=title, schedule=schedule, alpha=alpha, granularity=granularity)
  cut = dict(kind='cutmix', alpha=1.0, own_half=False, granularity=granularity)
  found['cutmix_always'] = dict(title='CutMix', schedule='always', **cut)
  found['cutmix_mwh'] = dict(title='mWh, CutMix', schedule='mwh', **cut)
  return found


def claims() -> tuple[dict, ...]:
  """Returns the claims about mixup with both alphas."""
  small, large = (
    {'baseline': f'mixup, alpha {a}', 'method': f'mWh, alpha {a}'} for a in ('0.5', 2)
  )
  less = dict(higher_is_better=False)
  loss = dict(metric='train_loss', **less)
  return (
    dict(
      statement='alpha 2: accuracy at least 0.3 points higher',
      metric='accuracy',
      margin=0.3,
      **large,
    ),
    dict(statement='alpha 0.5: at most 0.2 points lower', metric='accuracy', margin=-0.2, **small),
    dict(statement='from alpha 0.5 to 2 less accuracy is lost', metric='lost', **less, **large),
    dict(statement='alpha 0.5: lower loss on plain training images', **loss, **small),
    dict(statement='alpha 2: lower loss on plain training images', **loss, **large),
  )
