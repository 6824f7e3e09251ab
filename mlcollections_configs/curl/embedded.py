"""CURL on a small bottleneck ResNet of pasted digits, of which 500 images are left; minutes on two cores.

  python -m experiments.curl

Each of 1297 training digits lies at four random places and scales on a plain 16x16 canvas. Three stages of
two blocks, 16, 32 and 64 channels inside and twice as many on the trunk. Channels are ranked on 256 of the
images that are left; 80, 60 and 35 % of the operations stay. As in the paper stem and last trunk stay whole.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.network = dict(
    data=dict(
      name='pasted_digits',
      train_options=dict(pastes=4),
      test_options=dict(pastes=4),
      train_size=4 * 1297,
    ),
    augment=dict(kind='pad_crop', padding=2, flip=False),
    **resnet(epochs=12, batch_size=64),
  )
  config.limited = dict(total=500)
  config.proxy = 256
  config.protected = ('stem', 'layer3')
  config.shares = (0.8, 0.6, 0.35)
  config.augment = config.network['augment']
  config.recipe = tuning(epochs=40, base=0.01, warmup_epochs=2)
  config.refinement = dict(recipe=tuning(epochs=8, base=1e-4), augment=config.network['augment'])
  config.quantized = ('8w8a', '4w8a')
  config.claims = claims()
  config.reported = (
    'ImageNet, ResNet-50: 76.15 % at 4.09, 73.39 % at 1.11 billion multiply-accumulates. CUB-200, '
    'MobileNetV2: 78.77 % whole, 0.69 right behind pruning to a third, 77.43 after mixup and distillation, '
    '78.72 after label refinement; ResNet-50: 84.76, 2.05, 82.88, 83.64.'
  )
  return config


def resnet(epochs: int, batch_size: int) -> dict:
  """Returns a ResNet of three stages of two bottlenecks, and its training."""
  return dict(
    model=dict(
      name='cifar_resnet50',
      stage_sizes=(2, 2, 2),
      strides=(1, 2, 2),
      width=16,
      widths=(16, 32, 64),
      trunk_widths=(32, 64, 128),
      num_classes=10,
    ),
    recipe=dict(
      epochs=epochs,
      batch_size=batch_size,
      optimizer=dict(name='sgd', momentum=0.9, weight_decay=5e-4),
      schedule=dict(name='cosine', base=0.05, warmup_epochs=1),
    ),
  )


def tuning(epochs: int, base: float, warmup_epochs: int = 0, batch_size: int = 32) -> dict:
  """Returns a training of what is left, with the code's constants: weight decay 4e-5 on everything."""
  return dict(
    epochs=epochs,
    batch_size=batch_size,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=4e-5),
    schedule=dict(name='cosine', base=base, warmup_epochs=warmup_epochs),
  )


def claims() -> tuple[dict, ...]:
  """Returns the claims."""
  ranked = dict(method="CURL's ranking", baseline='random')
  tuned = dict(metric='trained')
  return (
    dict(statement='80 % of the operations: the ranking above a random one', metric='pruned_to_80', **ranked),
    dict(statement='60 % of the operations: likewise', metric='pruned_to_60', **ranked),
    dict(statement='trained on labels: not worse', margin=-1.0, **tuned, **ranked),
    dict(
      statement='mixup and distillation above labels',
      method='mixup and distillation', baseline="CURL's ranking", **tuned,
    ),
    dict(
      statement='label refinement not below it',
      method='label refinement', baseline='mixup and distillation', **tuned,
    ),
  )  # fmt: skip
