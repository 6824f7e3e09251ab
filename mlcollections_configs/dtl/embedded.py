"""DTL on digits: a transformer of four blocks, trained on their classes, adapted to tasks of 1000 images.

  python -m experiments.dtl

Digits on 16x16 canvases, in patches of 4x4: 17 tokens of 64 channels. All rows have the same epochs,
batches, schedule, learning rate and weight decay. What a step keeps is counted for six blocks and 28x28
pixels: 50 tokens. The other tasks: `--config.tasks=texture,noise,quadrant,size`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import adaptation


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.network = adaptation.derived_network()
  config.target = adaptation.derived_targets()
  config.tasks = ('rotation', 'count')
  config.recipe = adaptation.recipe(6, 2, base=3e-3)
  config.runs = ('linear', 'lora', 'full', 'dtl', 'dtl_plus')
  config.accounted = dict(depth=6, mlp_ratio=4.0, image_size=28, batch_size=32)
  config.claims = claims()
  config.reported = (
    'Mean of the three groups on VTAB-1k, ViT-B/16: DTL 76.7 % with 0.04 M trained numbers, LoRA 74.5 with '
    '0.29 M, linear probe 57.6, full tuning 68.9; about 3 GB in training in place of 5 to 6.'
  )
  return config


def claims() -> tuple[dict, ...]:
  """Returns the claims."""

  def below(metric: str, baseline: str, method: str, margin: float, what: str) -> dict:
    return dict(
      statement=what, metric=metric, baseline=baseline, method=method, margin=margin,
      higher_is_better=False,
    )  # fmt: skip

  return (
    dict(
      statement='structured tasks: at least 5 points above the linear probe', metric='structured',
      baseline='linear probe', method='DTL', margin=5.0,
    ),
    below('trained_with_head', 'LoRA', 'DTL', 1.0, 'fewer trained numbers than LoRA'),
    below('residual_mb', 'LoRA', 'DTL', 25.0, 'at least 25 MB less kept than by LoRA'),
    below('residual_mb', 'full tuning', 'DTL', 25.0, 'at least 25 MB less kept than by full tuning'),
    below('residual_mb', 'full tuning', 'LoRA', 0.0, 'LoRA keeps no more than full tuning'),
    below('residual_mb', 'DTL', 'linear probe', 1.0, 'the linear probe keeps least'),
  )  # fmt: skip
