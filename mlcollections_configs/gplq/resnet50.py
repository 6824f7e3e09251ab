"""GPLQ with ResNet-50 on ImageNet, of the paper's appendix.

  python -m experiments.gplq --config=resnet50 --workdir=gs://...

As `deit_small`; batch statistics go on in the first stage. The compensation of blocks of convolutions is the
grouped convolution of QwT, whose ridge is absolute.
"""

from ml_collections import ConfigDict

from mlcollections_configs.gplq import deit_small


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = deit_small.get_config()
  config.network = deit_small.network('resnet50')
  config.bits = ('4w4a',)
  config.qwt = dict(ridge=None, relative=False)
  config.reported = (
    'ImageNet accuracy and mean transfer to five data sets: ResNet-50 in float 78.7 and 66.2, GPLQ at '
    '4w4a 74.1 and 67.7.'
  )
  return config
