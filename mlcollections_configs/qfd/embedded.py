"""QFD on a small ResNet of pasted digits: 2-bit students of three basic blocks.

  python -m experiments.qfd

Each of 1297 training digits lies at four random places and scales on a plain 16x16 canvas; stem and
classifier stay in float.
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import resnet

RECIPE = dict(
  epochs=10,
  batch_size=64,
  optimizer=dict(name='adamw', weight_decay=1e-4),
  schedule=dict(name='cosine', base=1e-3),
)


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.network = resnet(digits(), strides=(2, 2, 2), epochs=10)
  del config.network['quantization']

  config.bits = ('2w2a',)
  config.target = dict(bits=(4, 1))
  config.calibration = 512
  config.teacher = RECIPE | dict(epochs=5)
  config.recipe = RECIPE
  config.ranges = dict(optimizer=dict(name='adamw'), schedule=dict(name='cosine', base=1e-3))
  config.weight = 0.5

  config.claims = (
    claim('QFD not below training under quantization', '2w2a', 0.0),
    claim('QFD within half a point of distilled float features', '2w2a', -0.5,
          baseline='float features distilled'),
    claim('4-bit features cost the teacher at most a point', '2w2a', -1.0, 'teacher, 4-bit features',
          'float'),
    claim('1-bit features cost it at most 2 points', '2w2a', -2.0, 'teacher, 1-bit features', 'float'),
  )  # fmt: skip
  config.reported = (
    'ImageNet, ResNet-34 at 4w4a: 74.7, 1.3 points above float. CIFAR-100, ResNet-18: at 2, 3 and 4 bits QFD '
    'above distilled float features, these above or level with distilled logits, and all above plain '
    'training under quantization.'
  )
  return config


def digits() -> dict:
  """Returns pasted digits; test images show each digit four times."""
  return dict(
    name='pasted_digits',
    train_options=dict(pastes=4),
    test_options=dict(pastes=4),
    train_size=4 * 1297,
  )


def claim(
  statement: str, bits: str, margin: float, method: str = 'QFD', baseline: str = 'QAT'
) -> dict:
  """Returns the claim that the accuracy of `method` is at least `margin` points above that of `baseline`."""
  return dict(
    statement=statement, metric=f'{bits}_accuracy', baseline=baseline, method=method, margin=margin
  )
