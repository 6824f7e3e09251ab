"""US3L with ResNet-18 on CIFAR-100, 400 epochs at 4 x 128 images, the cosine as base loss (official code).

The published statistics of projector and predictors are those of 128 images each; here they are of the whole
batch. Its linear probe resizes test images to 36 pixels and cuts 32 out of them.
"""

from ml_collections import ConfigDict

from mlcollections_configs.us3l import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='cifar100')
  config.augment = photographs(0.0)

  config.variants = embedded.variants()
  config.runs = ('us3l',)
  config.model = dict(
    name='cifar_resnet18', stage_sizes=(2, 2, 2, 2), width=64, strides=(1, 2, 2, 2)
  )
  config.heads = dict(hidden=2048, features=2048, predictor=2048)
  config.widths = dict(
    low=0.25, high=1.0, step=0.125, judged=(0.25, 0.5, 0.75, 1.0), passes=3,
    augment=dict(kind='resized_crop', scale=(0.8, 1.0), interpolation='bicubic'),
  )  # fmt: skip
  config.momentum = 0.99
  config.group_decay = dict(decay=2.5e-4, alpha=0.05)

  config.recipe = dict(
    epochs=400,
    batch_size=512,
    optimizer=dict(name='sgd', momentum=0.9),
    schedule=dict(name='cosine_per_epoch', base=0.05),
  )
  config.eval = dict(
    k=200,
    probe=dict(name='sgd', options=dict(learning_rate=30.0, epochs=100, batch_size=512)),
  )
  config.reported = (
    'Direct adaptation frequently collapses; one training and one copy of weights beat methods that are '
    'trained for each width, on CIFAR-100, ImageNet and after transfer.'
  )
  return config


def photographs(blur: float) -> dict:
  """Returns the augmentation of SimSiam with a chance of blur."""
  return dict(
    kind='resized_crop',
    scale=(0.2, 1.0),
    jitter=(0.4, 0.4, 0.4, 0.1),
    jitter_probability=0.8,
    grayscale_probability=0.2,
    blur_probability=blur,
  )
