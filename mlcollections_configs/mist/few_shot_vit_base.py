"""MIST on ViT-B/16 and five fine-grained sets of 1, 2, 4, 8 and 16 images a class.

  python -m experiments.mist --config=few_shot_vit_base --seeds=0,1,2 --workdir=DIR

The seed chooses among the three published draws. Ten augmented views of each training image are sent, and
trained on for as many steps as the rows have that draw their views anew. The device takes the last state;
rows that see the network choose theirs on the validation list. In float16 the 16653 training images of all 25
tasks take 50 GB, each test image 303 kB for every number of shots; the last layer takes as much again.
"""

from ml_collections import ConfigDict

from mlcollections_configs import adaptation
from mlcollections_configs.mist import vtab_vit_base


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = vtab_vit_base.get_config()
  config.target = adaptation.few_shot_targets()
  config.tasks = tuple(config.target)
  images = config.target['food101_1']['data'].to_dict()
  config.network = adaptation.public_network(adaptation.VIT_BASE, images)
  config.views = 10
  config.edge = dict(rank=16, depth=4)
  config.recipe.schedule.base = 5e-3
  config.tuning = dict()
  config.seed = 0
  config.claims = (
    vtab_vit_base.claim('mean above attention on the last layer', 'attention on the last layer', 0.0),
    vtab_vit_base.claim('mean above the linear probe', 'linear probe', 0.0),
  )  # fmt: skip
  config.reported = 'No numbers could be read; MIST is said to be competitive.'
  return config
