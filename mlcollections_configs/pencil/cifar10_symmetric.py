"""PENCIL with PreAct ResNet-32 on CIFAR-10, 30 % of the labels drawn anew: 70, 130 and 120 epochs.

Learning rate, alpha, beta and lambda as a re-implementation quotes the paper's table; all else of the
official script: 5000 training images are held out (and not looked at here), random crops of padded images,
flips. Prepare the data once: `tfds build cifar10 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.pencil import embedded

STAGES = (70, 200, 320)


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(
    name='cifar10', held_out=5000, noise=dict(kind='symmetric', rate=0.3),
    mean=(0.492, 0.482, 0.446), std=(0.247, 0.244, 0.262),
  )  # fmt: skip
  config.augment = dict(kind='pad_crop', padding=4)
  config.model = dict(
    name='wrn34_1'
  )  # three stages of five pre-activation blocks, 16 to 64 channels
  start, end, epochs = STAGES
  config.pencil = dict(start=start, end=end, alpha=0.1, beta=0.8, rate=300.0)
  config.recipe = dict(
    epochs=epochs,
    batch_size=128,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
    schedule=embedded.schedule(STAGES, 0.03, 0.2),
    eval_every=351,
  )
  config.log_every = 351
  config.checkpoint_every = 3510
  config.claims = embedded.claims()[:1]
  config.reported = (
    'CIFAR-10 with 20 / 50 / 80 % of symmetric noise, best (last) accuracy as later papers quote it: 92.4 '
    '(92.0), 89.1 (88.7), 77.5 (76.1) %; cross-entropy 86.8 (82.7), 79.4 (57.9), 62.9 (26.1) %.'
  )
  return config
