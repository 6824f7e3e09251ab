"""NRS behind a small PointNet on the digits' ink as 64 points in a plane."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='digit_points', shape=(64, 3), num_classes=10, train_size=1297)
  config.point_augment = dict(scale=(0.8, 1.25), shift=0.1)
  config.model = dict(name='pointnet', widths=(16, 32, 128), hidden=(64, 32))
  config.layers = {'NRS': dict(n_per=32)}
  config.hidden = (64, 32)
  config.dropout = 0.4
  config.transform_weight = 0.001
  config.recipe = dict(
    epochs=15,
    batch_size=64,
    optimizer=dict(name='adamw'),
    schedule=dict(name='cosine', base=3e-3),
  )
  return config
