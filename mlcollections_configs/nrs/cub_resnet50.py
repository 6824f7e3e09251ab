"""NRS behind a ResNet-50 with ImageNet weights on CUB-200-2011, with the constants of the official code.

Prepare the data once: `tfds build caltech_birds2011 --file_format=array_record`. The shorter side is
resized to 448; records have one shape, the central square, where the official code cuts 448 pixels at a
random place.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(
    name='caltech_birds2011', stored_image=(448, 448, 3), image_size=448,
    train_decode=dict(size=448), test_decode=dict(size=448),
  )  # fmt: skip
  config.augment = dict(kind='pad_crop', padding=0, flip=True)
  config.model = dict(name='resnet50')
  config.pretrained = 'resnet50.tv_in1k'  # inferred: torchvision's
  config.layers = {'NRS': dict(patch=3, n_mul=2, n_per=64)}
  config.recipe = dict(
    epochs=65,
    batch_size=32,  # 30 in the official code, which does not divide over devices
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
    schedule=dict(name='multistep', base=2e-3, milestones=(20, 40), factor=0.1),
    eval_every=187,
  )
  config.repeats = 0
  return config
