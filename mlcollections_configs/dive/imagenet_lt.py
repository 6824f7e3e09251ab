"""DiVE on ImageNet-LT with ResNeXt-50 (32x4d).

  python -m experiments.dive --config=mlcollections_configs/dive/imagenet_lt.py --workdir=gs://...

The paper's schedule is not published: 90 epochs (as quoted), batch 256, SGD with weight decay 5e-4 and a
learning rate of 0.1 along a cosine are the usual ones. Temperature and power are to be chosen by the virtual
examples (`virtual_examples.png`): the temperature where the groups are nearly level, halved for power 0.5.
DiVE is quoted with 53.1 %. Lists and photographs: see `long_tail.set_listed`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import long_tail
from mlcollections_configs.dive import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  long_tail.set_listed(config, 'ImageNet_LT')
  config.groups = dict(many=100, few=20)
  config.model = dict(backbone=dict(name='resnext50_32x4d'), head_init='torch')
  long_tail.set_stages(config, embedded.stages(long_tail.recipe(90, 256, 0.1, 5e-4)))
  config.claims = ()
  return config
