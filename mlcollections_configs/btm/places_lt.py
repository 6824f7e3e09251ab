"""BTM on Places-LT with ResNet-152, the paper's setting (constants of the official code).

  python -m experiments.btm --config=mlcollections_configs/btm/places_lt.py --workdir=gs://...

The network has ImageNet weights and is frozen, in eval mode; one more bottleneck (2048-512-2048) and the
classifier train for 90 epochs, and on each balanced subset. The second stage has mixup, too. To beat: MiSLAS,
40.4 % (its first stage 29.4 %). Lists and photographs: see `long_tail.set_listed`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import long_tail
from mlcollections_configs.btm import embedded, imagenet_lt


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  long_tail.set_listed(config, 'Places_LT')
  config.groups = dict(boundaries=(131, 288))
  config.model = dict(backbone=long_tail.PLACES_BACKBONE, head_init='torch')
  imagenet_lt.set_stages(
    config,
    epochs=90,
    weight_decay=5e-4,
    head=0.4,
    tail=0.1,
    mixup=0.2,
    **long_tail.PLACES_STAGE,
  )
  return config
