"""Feature mimicking on ImageNet, ResNet-34 to ResNet-18 (constants of the code): no bias, 2048 bits.

  python -m experiments.feature_mimicking --config=imagenet_resnet18 --workdir=gs://...

100 epochs, a tenth of the learning rate behind 30, 60 and 90. The teacher has torchvision's weights. Prepare
the data once: `tfds build imagenet2012 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.feature_mimicking import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  both = dict(data=dict(name='imagenet2012'), augment=dict(kind='resized_crop'))
  config = ConfigDict()
  config.teacher = both | dict(model=dict(name='resnet34'), pretrained='resnet34.tv_in1k')
  config.student = both | dict(
    model=dict(name='resnet18'),
    recipe=dict(
      epochs=100,
      batch_size=256,
      optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
      schedule=dict(name='multistep', base=0.1, milestones=(30, 60, 90), staircase=True),
    ),
  )
  config.hashing = dict(bits=2048, bias='zero', std=0.06)
  config.methods = embedded.methods(beta=5.0)
  config.runs = ('ce', 'lshl2')
  config.eval_batch_size = 1024
  config.log_every = 200
  config.checkpoint_every = 5004
  config.reported = (
    'ImageNet: ResNet-34 73.31 %; ResNet-18 71.72 % with LSH-L2, 69.75 to 70.13 alone.'
  )
  return config
