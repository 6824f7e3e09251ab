"""Seven methods on pasted digits with a tiny ViT, 1080 steps each; a quarter of an hour of one core.

Each of 1297 training digits lies at a random place and scale on a plain 16x16 canvas; the 2000 test images
show 500 others four times. Random features of this network are weak, those of a convolutional one are not.
Margins are half of what seed 10 gained.
"""

from ml_collections import ConfigDict

from mlcollections_configs import views

MEASURES = dict(knn_fp='nearest neighbors', probe_fp='linear probe')
METHODS = ('simclr', 'moco', 'byol', 'simsiam', 'dino', 'barlow', 'mae')


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='pasted_digits', test_options=dict(pastes=4))
  config.augment = views.pasted_digits() | dict(rotation=0.2)
  config.views = ({}, {})

  config.methods = METHODS
  config.model = dict(
    name='vit_tiny_patch16_224', patch_size=4, image_size=16, width=48, depth=3, num_heads=3
  )
  config.heads = dict(hidden=128, features=64, predictor=64, style='mlp')
  config.target = dict(momentum=0.99, queue_size=800, temperature=0.2)
  config.prototypes = dict(count=256, bottleneck=64, held_epochs=0)
  config.masking = dict(ratio=0.5, width=48, depth=1, num_heads=3)

  config.recipe = dict(
    epochs=180,
    batch_size=200,
    optimizer=dict(name='adamw', weight_decay=1e-3),
    schedule=dict(name='cosine', base=1e-3, warmup_epochs=18),
  )
  config.log_every = 20
  config.checkpoint_every = 200
  config.eval = dict(k=10)
  gains = {
    'SimCLR': 30.0, 'MoCo v2': 20.0, 'BYOL': 8.0, 'SimSiam': 10.0, 'DINO': 5.0, 'Barlow Twins': 20.0,
    'MAE': 8.0,
  }  # fmt: skip
  config.claims = tuple(claim(title, margin, 'probe_fp') for title, margin in gains.items())
  return config


def claim(title: str, margin: float, metric: str = 'knn_fp') -> dict:
  """Returns the claim that a method's features are better than those of the network as drawn."""
  return dict(
    statement=f'{title}: {MEASURES[metric]} at least {margin:g} points better than untrained',
    metric=metric,
    baseline='untrained',
    method=title,
    margin=margin,
  )
