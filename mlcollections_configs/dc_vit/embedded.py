"""DC-ViT on digits: a transformer of six blocks, 200 images without labels; two minutes on two cores.

A third of the blocks' operations is removed: from three blocks (DC-ViT), and by dropping two; and a quarter,
which no number of dropped blocks gives. Every tuning has 100 steps.
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import vit


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.network = vit(dict(name='digits'))
  config.network.model.update(width=48, depth=6, num_heads=4, mlp_ratio=4.0)
  config.targets = dict(
    third=dict(title='DC-ViT, 1/3', reduction=1 / 3, num_blocks=3),
    quarter=dict(title='DC-ViT, 1/4', reduction=0.25),
    dropped=dict(title='blocks dropped, 1/3', reduction=1 / 3),
    labels=dict(title='by labels, 1/4', reduction=0.25, tuning='labels'),
  )
  config.tiny = dict(total=200)
  config.recipe = dict(
    epochs=25,
    batch_size=48,
    optimizer=dict(name='adamw', weight_decay=1e-4),
    schedule=dict(name='cosine', base=1e-3),
  )
  config.loss_warmup = 0
  config.synthesis = dict(
    count=48, steps=600, warmup_steps=30, shift=1, flip=False, variation_power=0.6
  )
  config.log_every = 50
  config.claims = claims()
  config.reported = (
    'ImageNet, DeiT-B (81.8 %) with 16.6 % fewer operations: 81.3 %, by dropping blocks (PRACTISE, as '
    're-implemented by the authors) 79.3 %.'
  )
  return config


def claims() -> tuple[dict, ...]:
  """Returns the claims."""
  third, quarter = 'DC-ViT, 1/3', 'DC-ViT, 1/4'
  return (
    dict(statement='1/3 fewer: tuning recovers at least a point', metric='accuracy', margin=1.0,
         baseline=f'{third}, untuned', method=third),
    dict(statement='1/3 fewer: tuning brings features closer', metric='feature_error', margin=0.0,
         baseline=f'{third}, untuned', method=third, higher_is_better=False),
    dict(statement='a quarter fewer within 1 %', metric='off_target', margin=-1.0,
         baseline='original', method=quarter, higher_is_better=False),
    dict(statement='a quarter fewer: not below dropping two blocks', metric='accuracy', margin=0.0,
         baseline='blocks dropped, 1/3', method=quarter),
    dict(statement='features teach more than the labels of the images', metric='accuracy', margin=0.0,
         baseline='by labels, 1/4', method=quarter),
  )  # fmt: skip
