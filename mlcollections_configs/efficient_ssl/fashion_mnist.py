"""What the bank's beginning and the divergence do, on 2000 images of Fashion-MNIST; minutes on two cores.

A thin ResNet,
15 epochs, temperature 0.2, momentum 0.5, all rows compared, crops of a quarter of an image or more. Steps are
not timed here. Needs the data set on disk (Debian's package `dataset-fashion-mnist`) or prepared by TFDS.
"""

from ml_collections import ConfigDict

from mlcollections_configs.efficient_ssl import embedded
from mlcollections_configs.efficient_ssl.embedded import claim


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data = dict(
    name='fashion_mnist',
    train_size=2000,
    train_options=dict(limit=2000),
    test_options=dict(limit=1000),
  )
  config.augment = dict(
    kind='resized_crop',
    scale=(0.25, 1.0),
    jitter=(0.4, 0.0, 0.0, 0.0),
    flip_probability=0.5,
  )
  config.recipe.update(epochs=15, batch_size=128, eval_every=30)
  config.runs = ('npid', 'calibrated', 'single_branch', 'strong_kl')
  config.timed = 0
  started, both = 'NPID, calibrated', 'single branch'
  config.claims = (
    claim('neighbors after two epochs at least 3 points better', 'knn_early', 'NPID', started, 3.0),
    claim('neighbors at the end are not worse', 'knn_fp', 'NPID', started, 0.0),
    claim('the divergence costs at most 2 points', 'knn_fp', started, both, -2.0),
    claim('ten times the divergence costs at least 5', 'knn_fp', '10x KL', both, 5.0),
  )
  return config
