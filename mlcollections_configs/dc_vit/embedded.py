"""DC-ViT on digits: a transformer of five blocks, 200 images without labels; minutes on two cores.

A fifth of the blocks' operations is removed, from two blocks and by dropping one; and three tenths, which no
number of dropped blocks gives. Every tuning has 100 steps. Tuned by the 200 labels instead:
`--config.targets.more.tuning=labels`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import vit


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.network = vit(dict(name='digits'))
  config.network.model.update(width=48, depth=5, num_heads=4, mlp_ratio=4.0)
  config.targets = dict(
    fifth=dict(title='DC-ViT, 1/5', reduction=0.2, num_blocks=2),
    more=dict(title='DC-ViT, 3/10', reduction=0.3),
    dropped=dict(title='block dropped, 1/5', reduction=0.2),
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
  more, less = 'DC-ViT, 3/10', dict(higher_is_better=False)
  return (
    dict(statement='3/10 fewer: tuning recovers at least a point', metric='accuracy', margin=1.0,
         baseline=f'{more}, untuned', method=more),
    dict(statement='3/10 fewer: tuning brings features closer', metric='feature_error',
         baseline=f'{more}, untuned', method=more, **less),
    dict(statement='3/10 fewer: the target is met within 1 %', metric='off_target', margin=-1.0,
         baseline='original', method=more, **less),
  )  # fmt: skip
