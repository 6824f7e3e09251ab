"""CURL with MobileNetV2 on CUB-200-2011: a third of the operations, with the 5994 training images.

The whole network is fine-tuned from ImageNet's weights first; its recipe is not told [inferred: 100 epochs
of batches of 32 at 0.01, weight decay 1e-4]. Then the code's constants: 96 of 300 million multiply-
accumulates (its list is cut at 6890 entries), no trunk protected; 200 epochs of mixup and distillation, 16
epochs of label refinement on the set made six times as large. Prepare the data once: `tfds build
caltech_birds2011 --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.curl import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.network = birds('mobilenetv2_100', 'mobilenetv2_100.ra_in1k')
  config.limited = dict()
  config.protected = ('conv_stem', 'conv_head')
  config.shares = (96.07 / 299.8,)
  config.augment = dict(kind='resized_crop')
  config.recipe = embedded.tuning(epochs=200, base=0.01, warmup_epochs=5)
  config.refinement = dict(
    recipe=embedded.tuning(epochs=16, base=1e-4), augment=dict(kind='pad_crop', padding=0)
  )
  config.quantized = ()
  config.claims = embedded.claims()[2:]
  config.checkpoint_every = 1870
  return config


def birds(name: str, weights: str) -> dict:
  """Returns a network fine-tuned on CUB-200-2011."""
  return dict(
    data=dict(name='caltech_birds2011'),
    augment=dict(kind='resized_crop'),
    model=dict(name=name, num_classes=200),
    pretrained=weights,
    recipe=dict(
      epochs=100,
      batch_size=32,
      optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
      schedule=dict(name='cosine', base=0.01),
    ),
  )
