"""The backbones of `fashion_mnist` and the network as drawn, trained on with the labels of 1000 images.

All start from the same fresh classifier and take the same 40 epochs; without pretraining it is training from
scratch. Margins are some half of what seed 10 gained; there BYOL and SimSiam, which learn little in so few
steps, gained nothing.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ssl_baselines import fashion_mnist


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = fashion_mnist.get_config()
  config.fine_tuning = dict(
    recipe=dict(
      epochs=40,
      batch_size=100,
      optimizer=dict(name='adamw', weight_decay=0.05, no_decay=('ndim<=1',)),
      schedule=dict(name='cosine', base=1e-3, warmup_epochs=4),
    ),
    augment=dict(kind='resized_crop', scale=(0.6, 1.0), flip_probability=0.0),
  )
  config.claims = (claim('SimCLR', 1.0), claim('MoCo v2', 0.5))
  return config


def claim(title: str, margin: float) -> dict:
  """Returns the claim that a pretrained backbone ends above the network as drawn."""
  return dict(
    statement=f'{title}: fine-tuned above training from scratch by at least {margin:g}',
    metric='fine_tuned',
    baseline='untrained',
    method=title,
    margin=margin,
  )
