"""QwT-v2 on ImageNet with public weights: networks, bits and calibration as for QwT.

  python -m experiments.qwt_v2 --config=mlcollections_configs/qwt_v2/imagenet.py --workdir=gs://...

See `mlcollections_configs/qwt/imagenet.py` for the networks and the data.
"""

from ml_collections import ConfigDict

from mlcollections_configs.qwt import imagenet
from mlcollections_configs.qwt_v2 import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = imagenet.get_config()
  config.qwt_v2 = embedded.get_config().qwt_v2
  return config
