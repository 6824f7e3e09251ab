"""MLS with and without its warm-up, and MoCo v2, on canvases of two digits; a few minutes on two cores.

Two of 1297 training digits lie on each of 1500 plain 36x36 canvases, two of 500 others on each of the 600
test canvases. The setting of `fashion_mnist` in all else.
"""

from ml_collections import ConfigDict

from mlcollections_configs.mls import fashion_mnist


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = fashion_mnist.get_config()
  config.data = dict(name='digit_canvases')
  config.augment.flip_probability = 0.0
  return config
