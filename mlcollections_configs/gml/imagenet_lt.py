"""GML over a cross-entropy ResNet-50 on ImageNet-LT.

  python -m experiments.gml --config=mlcollections_configs/gml/imagenet_lt.py --workdir=gs://...
  ... --config.model.backbone.name=resnext50_32x4d

90 epochs for the network; 30 for the classifiers at batch 256, learning rate 0.1 along a cosine, weight decay
5e-4 (the paper's are not published). cRT and LWS as Kang et al. 2020: batch 512, learning rate 0.2, 10 and 5
epochs. Lists and photographs: see `long_tail.set_listed`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import long_tail
from mlcollections_configs.gml import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  long_tail.set_listed(config, 'ImageNet_LT')
  config.groups = dict(many=100, few=20)
  config.model = dict(backbone=dict(name='resnet50'), head_init='torch')
  stages = embedded.stages(
    long_tail.recipe(90, 256, 0.1, 5e-4),
    long_tail.recipe(30, 256, 0.1, 5e-4),
    crt=long_tail.recipe(10, 512, 0.2, 5e-4),
    lws=long_tail.recipe(5, 512, 0.2, 5e-4),
  )
  long_tail.set_stages(config, stages, skip=('ce_holdout',))
  config.claims = tuple(c for c in config.claims if c['method'] == 'CE + GML')
  return config
