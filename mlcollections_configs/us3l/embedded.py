"""US3L against targets of each width's own on pasted digits, a quarter to all of 64 channels; some minutes.

Each of 1297 training digits lies at a random place and scale on a plain 16x16 canvas; the 2000 test images
show 500 others four times. Both rows take the same widths in the same steps.
"""

from ml_collections import ConfigDict

from mlcollections_configs import views


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='pasted_digits', test_options=dict(pastes=4))
  config.augment = views.pasted_digits()

  config.variants = variants()
  config.runs = ('us3l', 'naive')
  config.model = dict(name='cifar_resnet18', stage_sizes=(1, 1, 1), width=16, strides=(2, 2, 2))
  config.heads = dict(hidden=128, features=128, predictor=128)
  config.widths = dict(
    low=0.25,
    high=1.0,
    step=0.25,
    judged=(0.25, 0.5, 1.0),
    augment=dict(kind='resized_crop', scale=(0.8, 1.0), flip_probability=0.0),
  )
  config.momentum = 0.99
  config.group_decay = dict(decay=2.5e-4, alpha=0.05)

  config.recipe = dict(
    epochs=60,
    batch_size=128,
    optimizer=dict(name='sgd', momentum=0.9),
    schedule=dict(name='cosine_per_epoch', base=0.05),
  )
  config.log_every = 10
  config.checkpoint_every = 200
  config.eval = dict(k=20)
  return config


def variants() -> dict:
  """Returns US3L, and a slimmable network that learns from itself at each width."""
  return dict(
    us3l=dict(title='US3L'),
    naive=dict(title='own targets', teacher='self', own_head=False),
    online=dict(title='online teacher', teacher='online'),
    shared_head=dict(title='one head', own_head=False),
    sandwich=dict(title='all widths from the start', growing=False),
  )
