"""S3L by MoCo v2 with ResNet-50 on CUB-200 alone, 800 epochs (constants of the official code).

Pretraining at 224 and at 112 pixels, in stages with the budgets that the names of the authors' checkpoints
say, and without conv5 at 112; then 120 epochs of fine-tuning at 224 with mixup, judged at the end (by the
authors at the best epoch). Images are decoded to 256x256 on the host, where the longer side loses its ends,
and cropped from there on the device. Prepare the data once: `tfds build caltech_birds2011
--file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import views
from mlcollections_configs.s3l import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='caltech_birds2011')
  config.augment = views.photographs()

  config.ssl = 'moco'
  config.model = dict(name='resnet50')
  config.heads = dict(hidden=0, features=128)
  config.target = dict(momentum=0.999, queue_size=4096, temperature=0.2)
  config.recipe = embedded.recipe(800, 128, 0.03, 1e-4, 'cosine_per_epoch')

  config.variants = variants()
  config.warm_up = dict(
    recipe=embedded.recipe(10, 64, 0.1, 5e-4, 'constant'), augment=crops(), head_init='normal'
  )
  config.fine_tuning = dict(recipe=embedded.recipe(120, 64, 0.1, 5e-4, 'cosine'), augment=crops())
  config.fine_tuning['recipe']['mixup'] = 1.0
  config.eval_batch_size = 256
  config.log_every = 50
  config.checkpoint_every = 2000
  config.reported = embedded.get_config().reported
  return config


def crops() -> dict:
  """Returns the authors' augmentation of small labeled sets: a random part of 224 pixels, a flip."""
  return dict(kind='pad_crop', padding=0)


def variants() -> tuple[dict, ...]:
  """Returns the rows; epochs of stages are those of the authors' checkpoints."""
  half, last = dict(size=112), dict(size=224, epochs=200)
  three = dict(size=56), dict(size=112, epochs=200), dict(size=224, epochs=100)
  return (
    dict(name='224 px', stages=(dict(size=224),), role='baseline'),
    dict(name='112 px', stages=(half,)),
    dict(name='112, then 224 px', stages=(half, last)),
    dict(name='56, 112, then 224 px', stages=three),
    dict(name='112 px, cut', stages=(half,), last_stage='attached'),
    dict(name='112 px, conv5 redrawn', stages=(half,), last_stage='redrawn', role='reference'),
  )
