"""Four methods on 1000 images of Fashion-MNIST with a tiny ViT, 200 steps each; some minutes on two cores.

Patches of 7 pixels, 48 channels, 3 blocks, one set of heads for all methods. Needs the data set on disk
(Debian's package `dataset-fashion-mnist`) or prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ssl_baselines import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data = dict(
    name='fashion_mnist',
    train_size=1000,
    train_options=dict(limit=1000),
    test_options=dict(limit=1000),
  )
  config.augment = dict(
    kind='resized_crop',
    scale=(0.3, 1.0),
    rotation=0.2,
    jitter=(0.4, 0.0, 0.0, 0.0),
    noise=0.05,
    flip_probability=0.0,
  )
  config.methods = ('simclr', 'moco', 'byol', 'simsiam')
  config.model.update(patch_size=7, image_size=28)
  config.target.queue_size = 400
  config.recipe.epochs = 40
  config.recipe.schedule.warmup_epochs = 4
  config.claims = (
    embedded.claim('SimCLR', 10.0),
    embedded.claim('MoCo v2', 10.0),
    embedded.claim('BYOL', 3.0),
    embedded.claim('SimSiam', 3.0),
  )
  return config
