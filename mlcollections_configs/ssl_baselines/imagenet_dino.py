"""DINO with ViT-S/16 on ImageNet, 800 epochs at batch 1024 (constants of the official code).

Two global and eight local views. Learning rate 5e-4 x 1024 / 256, weight decay from 0.04 to 0.4, the
teacher's share from 0.996 to 1, its temperature from 0.04 to 0.07 in 30 epochs; the prototypes are held for
the first. The probe reads the last class token; the reported one those of the last four blocks.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ssl_baselines import imagenet_simsiam


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_simsiam.get_config()
  config.augment.update(
    scale=(0.4, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), interpolation='bicubic', blur_kernel=23
  )
  local = dict(size=96, scale=(0.05, 0.4), blur_probability=0.5)
  config.views = (
    dict(blur_probability=1.0),
    dict(blur_probability=0.1, solarize_probability=0.2),
    *[local] * 8,
  )

  config.methods = ('dino',)
  config.model = dict(name='vit_small_patch16_224', drop_path=0.1, dynamic_image_size=True)
  config.heads = dict(hidden=2048)
  config.predictor_rate = None
  config.target = dict(momentum=0.996, final=1.0)
  config.prototypes = dict(
    count=65536, bottleneck=256, teacher_temperature=0.07, warmup_temperature=0.04,
    warmup_epochs=30, held_epochs=1,
  )  # fmt: skip
  config.final_weight_decay = 0.4
  config.recipe.update(epochs=800, batch_size=1024, precision='bfloat16')
  config.recipe.optimizer = dict(
    name='adamw', weight_decay=0.04, no_decay=('ndim<=1',), clip_per_tensor=3.0
  )
  config.recipe.schedule = dict(
    name='cosine', base=2e-3, end=1e-6, warmup_epochs=10, warmup_inclusive=True
  )
  config.eval = dict(
    k=20,
    temperature=0.07,
    probe=dict(
      name='sgd', options=dict(learning_rate=4e-3, epochs=100, batch_size=1024, milestones=None)
    ),
  )
  config.reported = 'ImageNet, ViT-S/16: linear probe 77.0 %, k-NN 74.5 % (800 epochs).'
  return config
