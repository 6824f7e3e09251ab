"""DiVE on iNaturalist 2018 with ResNet-50.

  python -m experiments.dive --config=mlcollections_configs/dive/inaturalist2018.py --workdir=gs://...

90 epochs (as quoted; 200 for the longer training), batch 256, SGD with weight decay 1e-4 and a learning rate
of 0.1 along a cosine: the usual ones, the paper's are not published. DiVE is quoted with 71.7 %.
Lists and photographs: see `long_tail.set_listed`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import long_tail
from mlcollections_configs.dive import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  long_tail.set_listed(config, 'iNaturalist18', **long_tail.INATURALIST)
  config.groups = dict(many=100, few=20)
  config.model = dict(backbone=dict(name='resnet50'), head_init='torch')
  long_tail.set_stages(config, embedded.stages(long_tail.recipe(90, 256, 0.1, 1e-4)))
  config.claims = ()
  return config
