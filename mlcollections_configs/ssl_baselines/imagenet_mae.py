"""MAE with ViT-B/16 on ImageNet, 800 epochs at batch 4096 (constants of the official code).

Crops and flips alone; three of four patches are hidden; a decoder of 8 blocks of 512 channels. Weights are
drawn as in this library's ViTs, the official ones by Xavier's rule. Fine-tuning is that of its code but for
RandAugment, random erasing and smoothed labels.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ssl_baselines import imagenet_simsiam


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_simsiam.get_config()
  config.augment = dict(kind='resized_crop', scale=(0.2, 1.0), interpolation='bicubic')
  config.methods = ('mae',)
  config.model = dict(name='vit_base_patch16_224')
  config.predictor_rate = None
  config.masking = dict(ratio=0.75, norm_pix_loss=True, width=512, depth=8, num_heads=16)
  config.eval.probe = dict(
    name='lars',
    options=dict(
      learning_rate=0.1, epochs=90, warmup_epochs=10, batch_size=16384, standardize=True
    ),
  )
  config.recipe.update(epochs=800, batch_size=4096, precision='bfloat16')
  config.recipe.optimizer = dict(
    name='adamw', weight_decay=0.05, betas=(0.9, 0.95), no_decay=('ndim<=1',)
  )
  config.recipe.schedule = dict(name='cosine', base=2.4e-3, warmup_epochs=40)  # 1.5e-4 x 4096 / 256
  config.fine_tuning = dict(
    recipe=dict(
      epochs=100,
      batch_size=1024,
      mixup=0.8,
      cutmix=1.0,
      mix_partners='flip',
      precision='bfloat16',
      optimizer=dict(name='adamw', weight_decay=0.05, no_decay=('ndim<=1',)),
      schedule=dict(name='cosine', base=2e-3, warmup_epochs=5),  # 5e-4 x 1024 / 256
    ),
    augment=dict(kind='resized_crop', scale=(0.08, 1.0), interpolation='bicubic'),
    model=dict(drop_path=0.1),
    layer_decay=0.65,
  )
  config.reported = 'ImageNet, ViT-B/16: fine-tuned 83.6 %, linear probe 67.8 % (1600 epochs).'
  return config
