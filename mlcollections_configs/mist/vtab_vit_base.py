"""MIST on ViT-B/16 of ImageNet-21k and the 19 tasks of VTAB-1k.

  python -m experiments.mist --config=vtab_vit_base --config.tasks=caltech101, --workdir=DIR
  python -m experiments.mist --config=vtab_vit_base --config.role=cloud --workdir=CLOUD

All of z_0 ... z_12 are summed; rank 16 and four modules are inferred, as is the recipe, DTL's. Learning rates
are chosen on 200 of the 1000 images, for every task and row. Files are read record by record: 303 kB an
image in float16. All 19 tasks have 387904 test images and 19000 others: 123 GB for the sum and as much again
for the last layer; in float32 (`--config.sent=float32`) twice that. Rows of a sweep: `--config.k=6`,
`--config.k=4 --config.spaced=true`, `--config.edge.rank=4`, `--config.edge.depth=8`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import adaptation

RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.target = adaptation.vtab_targets()
  config.network = adaptation.public_network(
    adaptation.VIT_BASE, config.target['caltech101']['data']
  )
  config.tasks = tuple(adaptation.VTAB)
  config.recipe = adaptation.recipe(100, 10)
  config.edge = dict(rank=16, depth=4, rates=RATES)
  config.reference = dict(rank=4, modules=4, remat=True)
  config.sent = 'float16'
  config.suffix = '.array_record'
  config.runs = ('linear', 'all_layers', 'last_layer', 'mlp', 'mist')
  config.tuning = {name: dict(rates=RATES) for name in ('linear', 'all_layers')}
  config.claims = (
    claim('mean of groups above attention on the last layer', 'attention on the last layer', 0.0),
    claim('mean of groups at least 10 points above the linear probe', 'linear probe', 10.0),
    claim('no more than 5 points below a side network given every layer', 'attention on every layer', -5.0),
  )  # fmt: skip
  config.reported = (
    'No numbers could be read. On VTAB-1k the group means of others are 57.6 % (linear probe), 74.6 (LoRA), '
    '76.4 (LAST) and 76.8 (DTL), and MIST is said to be competitive.'
  )
  return config


def claim(statement: str, baseline: str, margin: float) -> dict:
  """Returns the claim that MIST is at least `margin` better than `baseline` in the mean of groups."""
  return dict(statement=statement, metric='mean', baseline=baseline, method='MIST', margin=margin)
