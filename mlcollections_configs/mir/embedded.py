"""MiR on a small ResNet of pasted digits: half of the filters within its blocks removed, 50 and 200 images.

  python -m experiments.mir

Each of 1297 training digits lies at four random places and scales on a plain 16x16 canvas. Six basic
blocks, 44 thousand parameters; pruned in all blocks but those that change the shape.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.network = digits()
  config.totals = (50, 200)
  config.augment = config.network['augment']
  config.ratio = 0.5
  config.tuning = dict(steps=300)
  config.label_rate = 1e-4
  config.claims = claims(50, 200)
  config.reported = (
    'ImageNet: far above fine-tuning on labels, distilled logits and layer-wise reconstruction with 50 to '
    '1000 images; the map before pooling 0.5 to 2 points above pooled features.'
  )
  return config


def digits(blocks: int = 2, epochs: int = 12) -> dict:
  """Returns a ResNet of three stages on pasted digits; test images show each digit four times."""
  return dict(
    data=dict(
      name='pasted_digits',
      train_options=dict(pastes=4),
      test_options=dict(pastes=4),
      train_size=4 * 1297,
    ),
    augment=dict(kind='pad_crop', padding=2, flip=False),
    **resnet((2, 2, 2), blocks, epochs, 64),
  )


def resnet(strides: tuple, blocks: int, epochs: int, batch_size: int) -> dict:
  """Returns a ResNet of three stages of basic blocks, 8, 16 and 32 channels wide, and its training."""
  return dict(
    model=dict(
      name='cifar_resnet18', stage_sizes=(blocks,) * 3, strides=strides, width=8, num_classes=10
    ),
    recipe=dict(
      epochs=epochs,
      batch_size=batch_size,
      optimizer=dict(name='sgd', momentum=0.9, weight_decay=5e-4),
      schedule=dict(name='cosine', base=0.05),
    ),
  )


def claims(few: int, many: int, margin: float = 3.0) -> tuple:
  """Returns the claims about a smaller and a larger number of images."""
  first, last = f'accuracy_{few}', f'accuracy_{many}'
  found = [
    (f'{few} images: at least {margin:g} points above labels', first, 'labels (BP)', 'MiR', margin),
    (f'{few} images: above the pruned network', first, 'pruned', 'MiR', 0.0),
    (f'{few} images: not below pooled features', first, 'MiR, pooled features', 'MiR', 0.0),
    (f'{few} images: pooled features not below distilled logits', first, 'distilled logits',
     'MiR, pooled features', 0.0),
    (f'{few} images: distilled logits above labels', first, 'labels (BP)', 'distilled logits', 0.0),
    (f'{many} images: above labels', last, 'labels (BP)', 'MiR', 0.0),
  ]  # fmt: skip
  names = ('statement', 'metric', 'baseline', 'method', 'margin')
  return tuple(dict(zip(names, own)) for own in found)
