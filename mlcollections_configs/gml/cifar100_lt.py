"""GML over a cross-entropy ResNet-32 on CIFAR-100-LT.

  python -m experiments.gml --config=mlcollections_configs/gml/cifar100_lt.py --workdir=DIR

Other ratios: `--config.data.long_tail.ratio=50`. The network has the usual 200 epochs of the CIFAR-LT
literature, the classifiers 30 (LWS 5) at learning rate 0.1 along a cosine; the paper's constants for these
are not published. LDAM-DRW is a stage of its own. Prepare the data once:
`tfds build cifar100 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import long_tail
from mlcollections_configs.gml import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  return cifar(100)


def cifar(num_classes: int) -> ConfigDict:
  """Returns the configuration for CIFAR-10-LT or CIFAR-100-LT."""
  config = embedded.get_config()
  long_tail.set_cifar(config, num_classes)
  classifier = long_tail.recipe(30, 128, 0.1, 2e-4)
  stages = embedded.stages(
    long_tail.ldam_recipe(), classifier, crt=classifier, lws=long_tail.recipe(5, 128, 0.1, 2e-4)
  )
  ldam = dict(name='ldam', max_margin=0.5, scale=30.0, beta=0.9999, start=160)
  stages['ldam'] = long_tail.stage(
    'LDAM-DRW', 'reference', loss=ldam, head='cosine', **long_tail.ldam_recipe()
  )
  long_tail.set_stages(config, stages, skip=('ce_holdout',))
  config.claims = tuple(c for c in config.claims if c['method'] == 'CE + GML')
  return config
