"""Boxes of birds by random ResNet-50s on the test images of CUB-200, without pretraining.

Both sides resized to 224; the last stage has stride 1 (a map of 14x14), with sigmoids and arctans 2.
Variants: the activation, how convolutions are drawn, and after which stage the map is taken. Prepare the data
once: `tfds build caltech_birds2011 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.tobias import embedded, imagenet_10k


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_10k.get_config()
  config.localization = dict(
    data=dict(
      name='caltech_birds2011',
      stored_image=(224, 224, 3),
      test_options=dict(decode=False, fields=('bbox',)),
      test_decode=dict(size=224, stretch=True),
    ),
    boxes='bbox',
    relative=True,
    net=dict(model=dict(name='resnet50', strides=(1, 2, 2, 1)), features='layer4_2'),
    variants={
      'sigmoid': dict(activation='sigmoid', strides=(1, 2, 2, 2)),
      'arctan': dict(activation='arctan', strides=(1, 2, 2, 2), init='kaiming_tanh'),
      **{name.replace('_', ' '): dict(init=name) for name in INITIALIZERS},
      'conv1': dict(features='relu'),
      'conv1-2': dict(features='layer1_2'),
      'conv1-3': dict(features='layer2_3'),
      'conv1-4': dict(features='layer3_5'),
    },
    networks=3,
  )
  config.runs = ()
  config.claims = embedded.localized()
  return config


INITIALIZERS = ('kaiming_uniform', 'xavier_normal', 'xavier_uniform', 'normal', 'uniform')
