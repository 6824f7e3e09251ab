"""LAST on digits: a transformer of four blocks, trained on their classes, adapted to tasks of 1000 images.

  python -m experiments.last

Digits on 16x16 canvases, in patches of 4x4: 17 tokens of 64 channels. All rows have the same epochs,
batches, schedule, learning rate and weight decay. What a step keeps is counted for six blocks and 28x28
pixels: 50 tokens. The other rows of the ablation: `--config.runs=last,uncorrected,after,full_rank,remat`.
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
  config.side = dict(rank=4, gap=1, modules=1)
  config.runs = ('linear', 'lora', 'last', 'mlp')
  config.accounted = dict(depth=6, mlp_ratio=4.0, image_size=28, batch_size=32)

  config.claims = (
    dict(
      statement='at least 5 points above the linear probe on structured tasks',
      metric='structured', baseline='linear probe', method='LAST', margin=5.0,
    ),
    dict(
      # Half of what LoRA keeps.
      statement='at least 19 MB less kept for the backward pass than by LoRA',
      metric='residual_mb', baseline='LoRA', method='LAST', margin=19.0, higher_is_better=False,
    ),
  )  # fmt: skip
  return config
