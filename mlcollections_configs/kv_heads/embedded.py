"""KV heads on a byte-level Llama that learns the prose that ships with Python; minutes.

  python -m experiments.kv_heads

Three blocks of width 64, eight heads of 8 channels, rotary positions; 400 steps, calibrated on 64 windows.
The plan's toy is larger: four blocks of width 128, 500 steps of 8 x 128 bytes, 200 steps of tuning.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.network = text(dict(name='llama', hidden=176, num_heads=8))
  config.group_sizes = (2, 4)
  config.runs = ('svd_a', 'svd_w', 'mean', 'before', 'commuting', 'ignored')
  config.tuned = ('svd_a', 'svd_w', 'mean')
  config.calibration = dict(count=64, batch_size=32)
  config.tuning = tuning()
  config.decoding = dict(batch_size=8, length=512)
  config.log_every = 50
  config.eval_batch_size = 64
  wrong = ('SVD-a folded wrongly', 'SVD-a')
  config.claims = (
    *claims(2),
    *claims(4),
    claim('folding across rotations: at least 0.5 worse', 't2_loss', *wrong, margin=0.5),
  )
  config.reported = (
    'LLaMA2-7B, 13B and BLOOMZ-7B1: half, even three quarters of the heads of keys and values compressed '
    'with performance comparable to the original; SVD-a better than SVD-w. No table could be read.'
  )
  return config


def text(model: dict) -> dict:
  """Returns a decoder of three blocks on windows of 64 bytes, and its training: 400 steps of 1024 bytes."""
  return dict(
    data=dict(
      name='text',
      train_options=dict(length=64, stride=32, limit=6400),
      test_options=dict(length=64, limit=256),
      train_size=6400,
      length=64,
    ),
    model=dict(width=64, depth=3, vocab_size=256, max_length=512, **model),
    recipe=dict(
      epochs=1,
      batch_size=16,
      optimizer=dict(name='adamw', betas=(0.9, 0.95)),
      schedule=dict(name='cosine', base=5e-3, warmup_epochs=0.1),
    ),
  )


def tuning() -> dict:
  """Returns the fine-tuning: 60 steps of LoRA."""
  return dict(
    steps=60,
    rank=8,
    alpha=16.0,
    recipe=dict(
      epochs=1,
      batch_size=16,
      optimizer=dict(name='adamw'),
      schedule=dict(name='cosine', base=2e-3, warmup_epochs=0.1),
    ),
  )


def claims(group_size: int) -> tuple:
  """Returns the claims about groups of a size: a margin of 0 is an order."""
  loss, tuned = f't{group_size}_loss', f't{group_size}_tuned_loss'
  groups = f'groups of {group_size}'
  found = (
    claim(f'{groups}: SVD-a below SVD-w', loss, 'SVD-w', 'SVD-a'),
    claim(f'{groups}: SVD-w below mean pooling', loss, 'mean pooling', 'SVD-w'),
    claim(f'{groups}, fine-tuned: SVD-a below SVD-w', tuned, 'SVD-w', 'SVD-a'),
    claim(f'{groups}, fine-tuned: SVD-a below mean pooling', tuned, 'mean pooling', 'SVD-a'),
  )
  if group_size != 2:
    return found
  energy = claim(
    'half of the directions hold 80 % of the energy', 't2_energy', 'equal singular values', 'original',
    margin=30.0, higher_is_better=True,
  )  # fmt: skip
  return (*found, energy)


def claim(
  statement: str,
  metric: str,
  baseline: str,
  method: str,
  margin: float = 0.0,
  higher_is_better: bool = False,
) -> dict:
  """Returns a claim."""
  return dict(
    statement=statement,
    metric=metric,
    baseline=baseline,
    method=method,
    margin=margin,
    higher_is_better=higher_is_better,
  )
