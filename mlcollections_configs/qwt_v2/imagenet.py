"""QwT-v2 on ImageNet with public weights: networks, bits and calibration as for QwT.

  python -m experiments.qwt_v2 --config=mlcollections_configs/qwt_v2/imagenet.py --workdir=gs://...

See `mlcollections_configs/qwt/imagenet.py` for the networks and the data.
"""

from ml_collections import ConfigDict

from mlcollections_configs.qwt import imagenet


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = imagenet.get_config()
  config.qwt.fine_tuning = None
  config.qwt_v2 = dict(
    method=dict(granularity='linear'),
    options=dict(dtype='float32', target='local'),
    variants={
      'QwT-v2, global teacher': dict(options=dict(target='global')),
      'QwT-v2, blocks': dict(method=dict(granularity='block')),
    },
  )
  return config
