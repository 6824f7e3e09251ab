"""Feature mimicking on CIFAR-100 with wide residual networks, 40-2 to 16-2 (constants of the code).

  python -m experiments.feature_mimicking --config=cifar100_wrn --workdir=gs://...

240 epochs at 0.05, a tenth behind 150, 180 and 210 epochs. Both networks have 128 features, so that no layer
stands before the classifier. Other pairs: `--config.teacher.model.name=cifar_resnet56
--config.student.model.name=cifar_resnet20`. The code trains MobileNetV2 and ShuffleNet students, whose
versions for CIFAR are not here, at 0.01: `--config.student.recipe.schedule.base=0.01`. Prepare the data once:
`tfds build cifar100 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.feature_mimicking import embedded

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.teacher = learner('wrn40_2')
  config.student = learner('wrn16_2')
  config.hashing = dict(bits=None, bias='median')  # 32 for each dimension
  config.methods = embedded.methods(beta=6.0)
  del config.methods['ce_two']
  config.checkpoint_every = 7810
  config.reported = (
    'CIFAR-100, WRN-40-2 to WRN-16-2: at or above CRD, 75.48 %; KD 74.92 % (from memory).'
  )
  return config


def learner(name: str) -> dict:
  """Returns a network with the recipe of both."""
  return dict(
    data=dict(name='cifar100', mean=MEAN, std=STD),
    augment=dict(kind='pad_crop', padding=4),
    model=dict(name=name),
    recipe=dict(
      epochs=240,
      batch_size=64,
      optimizer=dict(name='sgd', momentum=0.9, weight_decay=5e-4),
      schedule=dict(name='multistep', base=0.05, milestones=(150, 180, 210), staircase=True),
    ),
  )
