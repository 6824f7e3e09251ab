"""BTM on CIFAR-100-LT with ResNet-32, first and second stage with the constants of MiSLAS.

  python -m experiments.btm --config=mlcollections_configs/btm/cifar100_lt.py --workdir=DIR

Mixup with alpha 1 in the first stage; cap 10 and K 10 are BTM's defaults. MiSLAS' smoothing (head, tail) and
learning rate factor of the classifier: (0.4, 0.1) and 0.2 at ratio 100, (0.3, 0.0) and 0.1 at 50, (0.2, 0.0)
and 0.1 at 10. Prepare the data once: `tfds build cifar100 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import long_tail
from mlcollections_configs.btm import embedded
from mlcollections_configs.long_tail import claim


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  long_tail.set_cifar(config, 100)
  config.groups = dict(boundaries=(36, 71))
  first = long_tail.ldam_recipe()
  first['schedule']['factor'] = 0.1  # a tenth from epochs 161 and 181
  second = long_tail.recipe(10, 128, 0.1, 2e-4, 'cosine_per_epoch')
  long_tail.set_stages(
    config,
    embedded.first_stages(first, first, cap=10, mixup=1.0)
    | embedded.second_stages(second, factor=0.2, head=0.4, tail=0.1),
  )
  config.merged = dict(of='balanced', count=10, vmapped=False, recompute_batch_stats=False)
  config.pictured = ('CE + mixup', 'merged', 'merged + LAS')
  config.claims = (
    claim('harmonic mean at least 1 point above CE', 'harmonic', 'CE + mixup', 'merged', 1.0),
  )
  return config
