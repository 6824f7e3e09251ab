"""GML on Places-LT: ResNet-152 with ImageNet weights, frozen, and one more bottleneck that is trained.

  python -m experiments.gml --config=mlcollections_configs/gml/places_lt.py --workdir=gs://...

Bottleneck and classifier as in the first stage of MiSLAS (90 epochs, batch 256), without mixup; classifiers
as on ImageNet-LT. Lists and photographs: see `long_tail.set_listed`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import long_tail
from mlcollections_configs.gml import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  long_tail.set_listed(config, 'Places_LT')
  config.groups = dict(many=100, few=20)
  config.model = dict(backbone=long_tail.PLACES_BACKBONE, head_init='torch')
  stages = embedded.stages(
    long_tail.recipe(90, 256, 0.1, 5e-4, 'cosine_per_epoch'),
    long_tail.recipe(30, 256, 0.1, 5e-4),
    crt=long_tail.recipe(10, 512, 0.2, 5e-4),
    lws=long_tail.recipe(5, 512, 0.2, 5e-4),
    **long_tail.PLACES_STAGE,
  )
  long_tail.set_stages(config, stages, skip=('ce_holdout',))
  config.claims = tuple(c for c in config.claims if c['method'] == 'CE + GML')
  return config
