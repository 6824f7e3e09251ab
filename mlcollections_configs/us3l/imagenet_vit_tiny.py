"""US3L on MoCo v3 with a slimmable ViT-Tiny, 300 epochs with AdamW; patches are embedded as drawn.

Which images the authors took is not known: ImageNet here. Heads keep their number and get narrower.
"""

from ml_collections import ConfigDict

from mlcollections_configs.us3l import imagenet_resnet18


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_resnet18.get_config()
  config.variants.us3l = dict(title='US3L', base='infonce', distill='infonce')
  config.runs = ('us3l',)
  config.model = dict(name='vit_tiny_patch16_224')
  config.heads = dict(hidden=4096, features=256, predictor=4096)
  config.widths.step = 0.25
  config.frozen = ('encoder/backbone/patch_embed/.*',)
  config.momentum, config.final_momentum = 0.99, 1.0
  config.temperature = 0.2
  config.group_decay = dict(decay=0.05, alpha=0.05)
  config.recipe.update(epochs=300, batch_size=512)
  config.recipe.optimizer = dict(name='adamw')
  config.recipe.schedule = dict(name='cosine', base=1.5e-4, warmup_epochs=40)
  return config
