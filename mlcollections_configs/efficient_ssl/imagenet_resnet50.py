"""Single-branch learning with ResNet-50 on ImageNet (augmentation and head of the official code).

The script's other constants for ImageNet are not known: those of CIFAR-10 stand, at 200 epochs. The bank,
1281167 rows of 256 channels, takes 1.3 GB, split over all devices. Small networks, which the paper is about:
`imagenet_mobilenetv2`. Prepare the data once: `tfds build imagenet2012 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import views
from mlcollections_configs.efficient_ssl import cifar10_resnet18


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = cifar10_resnet18.get_config()
  config.data = dict(name='imagenet2012', std=(0.228, 0.224, 0.225))
  config.augment = views.photographs()
  config.model = dict(name='resnet50')
  config.head.features = 256
  config.recipe.eval_every = 25020  # 10 epochs
  config.checkpoint_every = 5000
  config.eval_batch_size = 1024
  config.eval = dict(
    k=200,
    temperature=0.1,
    probe=dict(
      name='sgd', options=dict(learning_rate=30.0, epochs=100, batch_size=256, milestones=(60, 80))
    ),
  )
  return config
