"""DC-ViT with ViT-B on ImageNet: the operations of one, two and three blocks less, from two, three and four.

  python -m experiments.dc_vit --config=imagenet_vit_base --workdir=gs://...

500 unlabeled images; each of ten candidates of each size, and each further step, is tuned for 2000 epochs.
Constants are those of the official code; its counter takes shares of the whole network, and gives 2304, 1535
and 1151 of 3072 hidden neurons. As there, images are normalized with ImageNet's mean and deviation, although
these weights were trained with 0.5. Other sizes of the set: `--config.tiny.total=50` (100, 1000) with
`--config.recipe.batch_size=50`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import IMAGENET, imagenet_networks

# Of ViT-B and an image of 224 pixels, as the official code counts: a block, and all.
_TOKENS, _WIDTH, _HIDDEN = 197, 768, 3072
_BLOCK = 4 * _TOKENS * _WIDTH**2 + 8 * _TOKENS * _WIDTH + 2 * _TOKENS * _WIDTH * _HIDDEN
_ALL = 12 * _BLOCK + (_TOKENS - 1) * _WIDTH * 3 * 16**2 + 4 * _TOKENS * _WIDTH + 1000 * _WIDTH


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.network = network('vit_base')
  config.targets = {
    f'less_{count}': dict(
      title=f'DC-ViT, {count} less', reduction=count * _BLOCK / _ALL, num_blocks=count + 1
    )
    for count in (1, 2, 3)
  }
  config.counter = 'official'
  config.tiny = dict(total=500)
  config.recipe = dict(
    epochs=2000,
    batch_size=64,
    optimizer=dict(name='adamw', weight_decay=1e-4),
    schedule=dict(name='cosine_per_epoch', base=3e-5),
  )
  config.loss_warmup = 20
  config.synthesis = dict(variation_power=0.6)
  config.checkpoint_every = 5000
  return config


def network(name: str) -> dict:
  """Returns a network with public weights under timm's augmentation, and ImageNet's mean and deviation."""
  found = imagenet_networks()[name]
  decode = dict(size=224, resize=256, interpolation='bicubic')
  return {
    **{key: value for key, value in found.items() if key != 'quantization'},
    'data': dict(name='imagenet2012', test_decode=decode, **IMAGENET),
  }
