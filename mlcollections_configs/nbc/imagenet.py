"""NBC on ImageNet with public weights: networks, bits and calibration as for QwT.

  python -m experiments.nbc --config=mlcollections_configs/nbc/imagenet.py --workdir=gs://...

See `mlcollections_configs/qwt/imagenet.py` for the networks and the data.
"""

from ml_collections import ConfigDict

from mlcollections_configs.nbc import embedded
from mlcollections_configs.qwt import imagenet


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = imagenet.get_config()
  config.qwt.fine_tuning = None
  config.nbc = embedded.get_config().nbc
  return config
