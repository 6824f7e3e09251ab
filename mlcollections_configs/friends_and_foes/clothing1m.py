"""Clothing1M: a million images from shops, 14 classes, noisy as they come; ResNet-50 with ImageNet weights.

All constants are [inferred] (optimizer as in DivideMix's recipe: 80 epochs of 1000 batches of 32 are three
passes over the images; labels are filtered before each pass). Lists `data/clothing1m/noisy_train.txt` and
`clean_test.txt`, a line `path label` for every image, paths from `data/clothing1m` on.
"""

from ml_collections import ConfigDict

from mlcollections_configs.friends_and_foes import embedded
from mlcollections_configs.photographs import photographs


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data = photographs(
    'listed_images', 'data/clothing1m', 14, 1_000_000,
    train_split='data/clothing1m/noisy_train.txt', test_split='data/clothing1m/clean_test.txt',
  )  # fmt: skip
  config.augment = dict(kind='pad_crop', padding=0)
  config.model = dict(name='resnet50')
  config.pretrained = 'resnet50.tv_in1k'
  config.ssl = None
  config.warmup.update(epochs=1, batch_size=256)
  config.warmup.schedule.base = 0.1
  config.correction.confidence = 0.8
  config.recipe.update(
    epochs=3, batch_size=32, eval_every=31250,
    schedule=dict(name='multistep', base=0.002, milestones=(1.5,), factor=0.1),
  )  # fmt: skip
  config.recipe.optimizer.weight_decay = 1e-3
  config.runs = ('ce', 'ff', 'semi')
  config.log_every = 500
  config.checkpoint_every = 5000
  config.claims = embedded.claims()[:1]
  return config
