"""UP-ViTs on pasted digits: a transformer cut to half its width; some minutes on two cores.

Each of 1297 training digits lies at four random places and scales on a plain 16x16 canvas. The network has 4
blocks of 48 channels with 6 heads, of which 24 channels with 3 heads are left. Each row is trained for three
epochs.
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import vit

SHAPE = dict(name='vit_tiny_patch4_16', depth=4, num_classes=10)


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  data = dict(
    name='pasted_digits',
    train_options=dict(pastes=4),
    test_options=dict(pastes=4),
    train_size=4 * 1297,
  )
  config.network = vit(data, epochs=16) | dict(model=dict(**SHAPE, width=48, num_heads=6))
  config.target = dict(**SHAPE, width=24, num_heads=3, drop_path=0.1)
  config.candidates = 8
  config.recipe = dict(
    epochs=3,
    batch_size=64,
    optimizer=dict(name='adamw', weight_decay=1e-3),
    schedule=dict(name='cosine', base=1e-3, warmup_epochs=0.2),
  )
  config.claims = claims()
  config.reported = (
    'ImageNet, DeiT-B cut to the shape of DeiT-T: 75.9 %, DeiT-T trained as usual 72.2 %; to that of DeiT-S: '
    '81.6 %, DeiT-S 79.9 %.'
  )
  return config


def claims() -> tuple[dict, ...]:
  """Returns the claims."""

  def over(baseline: str, margin: float) -> dict:
    return dict(
      statement=f'accuracy at least {margin:g} points above {baseline}', metric='accuracy',
      baseline=baseline, method='UP-ViT', margin=margin,
    )  # fmt: skip

  return over('random channels', 0.3), over('drawn anew, labels alone', 2.0)
