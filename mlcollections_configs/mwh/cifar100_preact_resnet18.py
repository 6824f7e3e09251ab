"""mWh with PreAct ResNet-18 on CIFAR-100, 100 epochs, next to mixup and none (constants of the code).

Epochs are counted: even ones mix in the second stage. The network ends without norm and ReLU, as in the code.
Rows with alpha 2, with the stages reversed, and CutMix are ours. Prepare the data once:
`tfds build cifar100 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.mwh import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.network = dict(
    data=dict(name='cifar100'),
    augment=dict(kind='pad_crop', padding=4),
    model=dict(name='cifar_preact_resnet18', num_classes=100),
    recipe=dict(
      epochs=100,
      batch_size=128,
      optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
      # With a higher base the code rises to it from 0.1 over ten epochs: warmup_epochs=10, warmup_start=0.1.
      schedule=dict(name='multistep', base=0.1, milestones=(50, 75), staircase=True),
      eval_every=390,
    ),
  )
  config.mixing = embedded.rows('epoch')
  config.log_every = 100
  config.checkpoint_every = 1950
  return config
