"""BTM on CIFAR-100-LT with ResNet-32, first and second stage with the constants of MiSLAS.

Mixup with alpha 1 in the first stage; cap 10 and K 10 are BTM's defaults. MiSLAS' smoothing (head, tail) and
learning rate factor of the classifier: (0.4, 0.1) and 0.2 at ratio 100, (0.3, 0.0) and 0.1 at 50, (0.2, 0.0)
and 0.1 at 10. Prepare the data once: `tfds build cifar100 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.btm import embedded
from mlcollections_configs.btm.embedded import claim


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  # The published selection (NumPy's legacy generator, seed 0) out of TFDS' order of the images.
  config.data = dict(
    name='cifar100', imbalance=dict(kind='exponential', max_count=500, ratio=100.0)
  )
  config.groups = dict(boundaries=(36, 71))
  config.augment = dict(kind='pad_crop')
  config.model = dict(name='cifar_resnet32')  # option-A shortcuts
  config.head_init = 'kaiming'

  sgd = dict(name='sgd', momentum=0.9, weight_decay=2e-4)
  # Learning rate e / 50 in epoch e = 1 ... 5, a tenth from epochs 161 and 181.
  steps = dict(
    name='multistep', base=0.1, milestones=(160, 180), factor=0.1,
    warmup_epochs=5, warmup_start=0.02, warmup_inclusive=True, staircase=True,
  )  # fmt: skip
  config.network = dict(epochs=200, batch_size=128, optimizer=sgd, schedule=steps, mixup=1.0)
  config.fine_tuning = config.network.copy_and_resolve_references()
  config.merging = dict(count=10, cap=10)
  config.crt = None
  config.second = dict(
    epochs=10,
    batch_size=128,
    optimizer=sgd | embedded.scaling(0.2),
    schedule=dict(name='cosine_per_epoch', base=0.1),
  )
  config.smoothing = dict(head=0.4, tail=0.1)
  config.runs = ('stage1', 'balanced', 'las_stage1', 'las_merged')

  config.pictured = ('CE + mixup', 'merged', 'merged + LAS')
  config.claims = (
    claim('harmonic mean at least 1 point above CE', 'harmonic', 'CE + mixup', 'merged', 1.0),
  )
  return config
