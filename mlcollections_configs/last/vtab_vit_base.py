"""LAST on ViT-B/16 of ImageNet-21k and the 19 tasks of VTAB-1k.

  python -m experiments.last --config=vtab_vit_base --workdir=DIR
  python -m experiments.last --config=vtab_vit_base --config.tasks=caltech101, --workdir=DIR

Rank 4, gap 1 and four modules a block are the split that gives the paper's 0.66 M numbers. Its learning rates
are not known; five are trained side by side on 800 images and chosen on 200, for every task and row, then
all 1000 images are trained on. The rest of the recipe is inferred: DTL's, of the same group. Of each module
the input alone is kept for the backward pass (`--config.side.remat=false`: all). Prepare each data set once:
`tfds build NAME --file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import adaptation

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.target = adaptation.vtab_targets()
  config.network = adaptation.public_network(
    adaptation.VIT_BASE, config.target['caltech101']['data']
  )
  config.tasks = tuple(adaptation.VTAB)
  config.recipe = adaptation.recipe(100, 10) | dict(precision='bfloat16')
  config.side = dict(rank=4, gap=1, modules=4, combine='before', remat=True)
  config.runs = ('linear', 'lora', 'last')
  config.tuning = {name: dict(rates=RATES) for name in config.runs}
  config.claims = (
    claim('mean of groups above LoRA', 'mean', 'LoRA', 0.0),
    claim('mean of groups at least 10 points above the linear probe', 'mean', 'linear probe', 10.0),
    claim('structured tasks at least 5 points above the linear probe', 'structured', 'linear probe', 5.0),
  )  # fmt: skip
  config.reported = (
    'Mean of the three groups on VTAB-1k, ViT-B/16: LAST 76.4 % with 0.66 M trained numbers, LoRA 74.6 with '
    '0.29 M, linear probe 57.6, full tuning 69.0; about 30 % of the memory and 60 % of the time of others.'
  )
  return config


def claim(statement: str, metric: str, baseline: str, margin: float) -> dict:
  """Returns the claim that LAST is at least `margin` better than `baseline`."""
  return dict(statement=statement, metric=metric, baseline=baseline, method='LAST', margin=margin)
