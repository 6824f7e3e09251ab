"""PENCIL with ResNet-50 (ImageNet weights) on Clothing1M: a million images from shops, 14 classes.

Lists `data/clothing1m/noisy_train.txt` and `clean_test.txt`, a line `path label` for every image, paths from
`data/clothing1m` on. Constants as a re-implementation quotes the paper's table, the learning rate of the
second stage from memory. The label logits take 56 MB.
"""

from ml_collections import ConfigDict

from mlcollections_configs.pencil import embedded
from mlcollections_configs.photographs import photographs

STAGES = (5, 15, 25)


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = photographs(
    'listed_images', 'data/clothing1m', 14, 1_000_000,
    train_split='data/clothing1m/noisy_train.txt', test_split='data/clothing1m/clean_test.txt',
  )  # fmt: skip
  config.augment = dict(kind='pad_crop', padding=0)
  config.model = dict(name='resnet50')
  config.pretrained = 'resnet50.tv_in1k'
  start, end, epochs = STAGES
  config.pencil = dict(start=start, end=end, alpha=0.08, beta=0.8, rate=3000.0)
  config.recipe = dict(
    epochs=epochs,
    batch_size=32,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-3),
    schedule=embedded.schedule(STAGES, 1.6e-3, 5e-4, joint=8e-4),
    eval_every=31250,
  )
  config.log_every = 500
  config.checkpoint_every = 5000
  config.claims = embedded.claims()[:1]
  config.reported = 'Test accuracy 73.49 %, cross-entropy 68.94 %, the best method before 72.16 %.'
  return config
