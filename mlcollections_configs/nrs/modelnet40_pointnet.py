"""NRS behind PointNet on ModelNet40, 1024 points; resampled clouds in `data/modelnet40_normal_resampled`.

The augmentation (points dropped, scaled, moved) is that of the PointNet code which the official one builds on
[inferred].
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  options = dict(root='data/modelnet40_normal_resampled', num_points=1024)
  config.data = dict(
    name='point_clouds', shape=(1024, 3), num_classes=40, train_size=9843,
    train_options=options, test_options=options, num_threads=8,
  )  # fmt: skip
  config.point_augment = dict(dropout=0.875, scale=(0.8, 1.25), shift=0.1)
  config.model = dict(name='pointnet')
  config.layers = {'NRS': dict(patch=3, n_mul=1, n_per=32)}
  config.hidden = (512, 256)
  config.dropout = 0.4
  config.transform_weight = 0.001
  config.recipe = dict(
    epochs=200,
    batch_size=24,
    # PyTorch's Adam adds the decay to the gradient.
    optimizer=dict(name='adam', weight_decay=1e-4),
    schedule=dict(name='multistep', base=1e-3, milestones=tuple(range(20, 200, 20)), factor=0.7),
    eval_every=410,
  )
  config.repeats = 0
  return config
