"""A teacher of 1297 digits and four times narrower students of 130 of them; a minute on two cores.

Small convolutional networks on images that are shifted by up to a pixel; the features that are mimicked have
128 dimensions, those of the student 32. All students see the same batches, a tenth of the teacher's images.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.teacher = dict(
    data=dict(name='digits'),
    augment=shifts(),
    model=dict(name='convnet', widths=(32, 64), hidden=(128,)),
    recipe=recipe(epochs=15),
  )
  config.student = dict(
    data=dict(name='digits', train_size=130, train_options=dict(limit=130)),
    augment=shifts(),
    model=dict(name='convnet', widths=(8, 16), hidden=(32,)),
    recipe=recipe(epochs=200, batch_size=32, base=0.02),
  )
  config.hashing = dict(bits=2048, bias='median')
  config.methods = methods(beta=1.0)
  config.log_every = 50
  config.claims = claims()
  config.pictured = ('L2', 'LSH', 'LSH-L2')
  config.reported = (
    'ImageNet, ResNet-34 to ResNet-18: top-1 71.72 % with LSH-L2, the student alone 69.8 to 70.1 (from '
    'memory). VOC2007, ResNet-101 to MobileNetV2: mAP 90.14. VOC2007+2012 detection, ResNet-101 to '
    'ResNet-50: AP50 83.0 with LSH-L2 and with L2, 82.6 with LSH, 82.0 without.'
  )
  return config


def shifts() -> dict:
  """Returns the augmentation of digits: by up to a pixel to each side."""
  return dict(kind='pad_crop', padding=1, flip=False)


def recipe(epochs: int, batch_size: int = 64, base: float = 0.05) -> dict:
  """Returns a recipe with the optimizer of the paper's CIFAR-100."""
  return dict(
    epochs=epochs,
    batch_size=batch_size,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=5e-4),
    schedule=dict(name='cosine', base=base),
  )


def methods(beta: float, where_right: bool = True) -> dict:
  """Returns the rows: labels, with the layer before the classifier, too; distilled logits; features."""
  features = dict(beta=beta, where_right=where_right)
  return dict(
    ce=dict(title='CE'),
    ce_two=dict(title='CE, two layers', two_layers=True),
    kd=dict(title='KD', alpha=1.0),
    l2=dict(title='L2', features=('l2',), **features),
    lsh=dict(title='LSH', features=('lsh',), **features),
    lshl2=dict(title='LSH-L2', features=('l2', 'lsh'), **features),
  )


def claims() -> tuple[dict, ...]:
  """Returns the claims."""
  return (
    dict(
      statement='LSH-L2 at least a point above labels alone', metric='accuracy', baseline='CE',
      method='LSH-L2', margin=1.0,
    ),
    dict(
      statement='LSH-L2 not below L2', metric='accuracy', baseline='L2', method='LSH-L2'
    ),
    dict(
      statement='LSH-L2 no less in the direction of the teacher than L2', metric='cosine', baseline='L2',
      method='LSH-L2',
    ),
    dict(
      statement='LSH leaves lengths freer than L2', metric='norm_spread', baseline='L2', method='LSH'
    ),
  )  # fmt: skip
