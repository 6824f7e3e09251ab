"""QFD with ResNet-18 on ImageNet, with the schedule of EWGS's code (QFD gives none).

  python -m experiments.qfd --config=imagenet_resnet18 --workdir=gs://...

100 epochs of SGD at 1e-2 from torchvision's weights, ranges by Adam at 1e-5. How long the teacher is
fine-tuned is not known: 10 epochs. ResNet-34: `--config.network.model.name=resnet34
--config.network.pretrained=resnet34.tv_in1k`. Prepare the data once: `tfds build imagenet2012
--file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import imagenet_networks


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.network = network('resnet18')

  config.bits = ('4w4a', '3w3a', '2w2a')
  config.target = dict(bits=(4,))
  config.calibration = 256
  student = dict(
    epochs=100,
    batch_size=256,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
    schedule=dict(name='cosine', base=1e-2),
  )
  config.recipe = student
  config.teacher = student | dict(epochs=10)
  config.ranges = dict(optimizer=dict(name='adamw'), schedule=dict(name='cosine', base=1e-5))
  config.weight = 0.5
  config.eval_batch_size = 1024
  config.checkpoint_every = 5000
  config.reported = (
    'ImageNet, ResNet-34 at 4w4a: 74.7, 1.3 points above float. ResNet-18 at 4w4a, 3w3a and 2w2a about 71.1, '
    '70.3 and 67.6 (from memory).'
  )
  return config


def network(name: str) -> dict:
  """Returns a network with public weights under random resized crops and flips."""
  found = dict(imagenet_networks()[name])
  del found['quantization']
  kernel = found['data']['test_decode']['interpolation']
  return found | dict(augment=dict(kind='resized_crop', interpolation=kernel))
