"""QFD with ResNet-18 on CIFAR-100, with the schedule of EWGS's code (QFD gives none).

  python -m experiments.qfd --config=cifar100_resnet18 --workdir=gs://...

400 epochs in float with SGD, 40 of the teacher (of a third party's code), 400 of each student: Adam at 1e-3
for weights, its decay in the gradient, and at 1e-5 for ranges. Prepare the data once: `tfds build cifar100
--file_format=array_record`. Of the paper, too: `--config.bits=1w1a,1w32a`; QFD on CIFAR-10 with ResNet-20:
`--config.network.data.name=cifar10 --config.network.model.name=cifar_resnet20
--config.network.model.num_classes=10`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.network = dict(
    data=dict(name='cifar100'),
    augment=dict(kind='pad_crop'),
    model=dict(name='cifar_resnet18', num_classes=100),
    recipe=dict(
      epochs=400,
      batch_size=256,
      optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
      schedule=dict(name='cosine', base=0.1),
    ),
  )

  config.bits = ('4w4a', '3w3a', '2w2a')
  config.target = dict(bits=(4,))
  config.calibration = 256
  student = dict(
    epochs=400,
    batch_size=256,
    optimizer=dict(name='adam', weight_decay=1e-4),
    schedule=dict(name='cosine', base=1e-3),
  )
  config.recipe = student
  config.teacher = student | dict(epochs=40)
  config.ranges = dict(optimizer=dict(name='adamw'), schedule=dict(name='cosine', base=1e-5))
  config.weight = 0.5
  config.checkpoint_every = 5000
  config.reported = (
    'CIFAR-100, ResNet-18: at 2, 3 and 4 bits QFD above distilled float features, these above or level with '
    'distilled logits, and all above plain training under quantization.'
  )
  return config
