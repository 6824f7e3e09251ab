"""QwT-v2 on ImageNet with public weights: networks, bits and calibration as for QwT.

  python -m experiments.qwt_v2 --config=imagenet --workdir=gs://...

See `mlcollections_configs/qwt/imagenet.py` for the data.
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import imagenet_networks


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.networks = ('deit_tiny', 'deit_small', 'deit_base')
  config.network = imagenet_networks()

  config.bits = ('8w8a', '6w6a', '4w4a')
  config.calibration = dict(ranges=32, compensation=512, batch_size=32)

  config.qwt_v2 = dict(granularity='linear')
  config.fitting = dict(dtype='float32', target='local')
  config.variants = {
    'QwT-v2, global teacher': dict(fitting=dict(dtype='float32', target='global')),
    'QwT-v2, blocks': dict(
      method=dict(granularity='block'), fitting=dict(dtype='float32', target='local')
    ),
  }
  return config
