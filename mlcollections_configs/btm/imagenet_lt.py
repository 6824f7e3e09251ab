"""BTM on ImageNet-LT with ResNet-50, the paper's setting (constants of the official code).

  python -m experiments.btm --config=mlcollections_configs/btm/imagenet_lt.py --workdir=gs://...

180 epochs at batch 256 with mixup (alpha 0.2), then ten times the same on balanced subsets of at most 10
images a class from the trained network, the merge, and MiSLAS' second stage for 10 epochs. To beat: MiSLAS,
52.7 % (its first stage 45.5 %). Lists and photographs: see `long_tail.set_listed`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import long_tail
from mlcollections_configs.btm import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  long_tail.set_listed(config, 'ImageNet_LT')
  config.groups = dict(boundaries=(390, 835))
  config.model = dict(backbone=dict(name='resnet50'), head_init='torch')
  set_stages(config, epochs=180, weight_decay=5e-4, head=0.3, tail=0.0)
  return config


def set_stages(
  config: ConfigDict,
  *,
  epochs: int,
  weight_decay: float,
  head: float,
  tail: float,
  mixup: float = 0.0,
  **first,
) -> None:
  """Sets stages and merge; `mixup` is the second stage's, `first` further options of the stages before."""
  recipe = long_tail.recipe(epochs, 256, 0.1, weight_decay, 'cosine_per_epoch')
  second = long_tail.recipe(10, 256, 0.1, weight_decay, 'cosine_per_epoch')
  long_tail.set_stages(
    config,
    embedded.first_stages(recipe, recipe, cap=10, mixup=0.2, **first)
    | embedded.second_stages(
      second,
      factor=0.05,
      head=head,
      tail=tail,
      mixup=mixup,
      eval_mode=first.get('eval_mode', ()),
    ),
  )
  config.merged = dict(of='balanced', count=10, vmapped=False, recompute_batch_stats=False)
  config.pictured = ('CE + mixup', 'merged', 'merged + LAS')
  config.claims = ()
