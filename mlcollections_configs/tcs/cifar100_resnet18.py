"""TCS on CIFAR-100 at 224 pixels: ResNet-18 in the coordinates of DINOv2's ViT-S.

  python -m experiments.tcs --config=cifar100_resnet18 --workdir=gs://...

300 epochs of SGD at 0.05 with decay 2e-3 in batches of 512, as in the benchmark OFA-KD (from memory, not
verified). The other constants as of `imagenet_resnet18`. Prepare the data once: `tfds build cifar100
--file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.tcs import imagenet_resnet18


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_resnet18.get_config()
  config.teacher = imagenet_resnet18.teacher('small', data())
  config.student.data = data()
  config.student.recipe = dict(
    epochs=300,
    batch_size=512,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=2e-3),
    schedule=dict(name='cosine', base=0.05),
  )
  config.checkpoint_every = 970
  return config


def data() -> dict:
  """Returns the images, enlarged and normalized as the teacher has them."""
  return dict(
    name='cifar100',
    train_options=dict(decode=False),
    test_options=dict(decode=False),
    train_decode=dict(size=224),
    test_decode=dict(size=224),
    stored_image=(224, 224, 3),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
  )
