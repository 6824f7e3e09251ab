"""NRS behind a small convolutional network on the digits' images, and as many layers without it."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='digits')
  config.model = dict(
    name='cifar_resnet18', stage_sizes=(1, 1), widths=(16, 32), strides=(1, 2), width=16
  )
  # 32 pooled features; groups of 16 subsets a convolution.
  config.layers = {'NRS': dict(n_mul=2, n_per=16)}
  config.recipe = dict(
    epochs=15,
    batch_size=64,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
    schedule=dict(name='cosine', base=0.05),
  )
  return config
