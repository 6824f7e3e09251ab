"""MLS with and without its warm-up, and MoCo v2, on canvases of two pieces of Fashion-MNIST; 180 steps each.

Two pieces of 15 to 19 pixels on each black 36x36 canvas, 1500 for training and 600 for the test; four
convolutions under global average pooling. Batches of 120, not 125, divide over 8 devices, dictionaries of 480
are four of them. Needs the data set on disk (Debian's package `dataset-fashion-mnist`) or prepared by TFDS.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='fashion_canvases')
  config.augment = dict(
    kind='resized_crop', scale=(0.3, 1.0), jitter=(0.4, 0.0, 0.0, 0.0), noise=0.05
  )

  config.model = dict(
    name='vgg11_bn', stage_sizes=(1, 1, 1, 1), widths=(16, 32, 64, 64), hidden=None
  )
  config.heads = dict(hidden=64, features=32)
  config.target = dict(momentum=0.99, queue_size=480, temperature=0.2)
  config.losses = dict(
    mls=dict(title='MLS'),
    # From the step on in which the dictionaries hold no vector any more that was drawn.
    early=dict(title='MLS without warm-up', k=10, warmup=4 / 180),
    alone=dict(title='BCE alone', warmup=4 / 180, info_nce=False),
  )

  config.recipe = dict(
    epochs=15,
    batch_size=120,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
    schedule=dict(name='cosine', base=0.1),
  )
  config.log_every = 4
  config.checkpoint_every = 180
  config.eval = dict(k=20, bank=1500, l2=1 / 3000)
  config.claims = (
    claim('mAP at most 1 point below that of MoCo v2 at equal steps', 'mAP', 'MoCo v2', -1.0),
    claim('without warm-up mAP is at least 2 points lower', 'mAP', 'MLS without warm-up', 2.0),
    claim('neighbors share a class at least 2 points more often', 'precision', 'untrained', 2.0),
  )  # fmt: skip
  config.pictured = ('MLS', 'MLS without warm-up')
  config.reported = (
    'COCO, ResNet-50-FPN Mask R-CNN, 400 epochs: box AP 40.1 with the loss and 38.8 without it; VOC07 '
    "fine-tuned 85.8 mAP against MoCo v2's 80.5."
  )
  return config


def claim(statement: str, metric: str, baseline: str, margin: float) -> dict:
  """Returns the claim that MLS is better than a row by `margin`."""
  return dict(statement=statement, metric=metric, baseline=baseline, method='MLS', margin=margin)
