"""BTM on iNaturalist 2018 with ResNet-50, the paper's setting (constants of the official code).

  python -m experiments.btm --config=mlcollections_configs/btm/inaturalist2018.py --workdir=gs://...

200 epochs, otherwise as on ImageNet-LT. To beat: MiSLAS, 71.6 % (its first stage 66.9 %).
Lists and photographs: see `long_tail.set_listed`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import long_tail
from mlcollections_configs.btm import embedded, imagenet_lt


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  long_tail.set_listed(config, 'iNaturalist18', **long_tail.INATURALIST)
  config.groups = dict(boundaries=(842, 4543))
  config.model = dict(backbone=dict(name='resnet50'), head_init='torch')
  imagenet_lt.set_stages(config, epochs=200, weight_decay=1e-4, head=0.3, tail=0.0)
  return config
