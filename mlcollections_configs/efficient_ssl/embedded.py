"""One branch and a memory bank against two views, on pasted digits, at equal steps; minutes of CPU time.

Each of 1297 training digits lies at a random place and scale on a plain 16x16 canvas; the 2000 test images
show 500 others four times. All rows of the bank are compared in every step. Features are judged every 10
epochs. What the parts of the method do is looked at in `fashion_mnist`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import views


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='pasted_digits', test_options=dict(pastes=4))
  config.augment = views.pasted_digits()

  config.model = dict(name='cifar_resnet18', stage_sizes=(1, 1, 1), width=16, strides=(2, 2, 2))
  config.bank = dict(negatives=None, temperature=0.2, momentum=0.5, kl_weight=20.0)
  config.head = dict(hidden=128, features=64, layers=2)
  config.heads = dict(hidden=128, features=128, predictor=64)
  config.target = dict(momentum=0.99, queue_size=1024, temperature=0.2)
  config.runs = ('npid', 'single_branch', 'simsiam')

  config.recipe = dict(
    epochs=40,
    batch_size=128,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
    schedule=dict(name='cosine_per_epoch', base=0.3),
    eval_every=100,
  )
  config.log_every = 50
  config.checkpoint_every = 300
  config.eval = dict(k=10)
  config.claims = (
    claim('FLOPs of a step at least 0.4 of the two-view ones less', 'relative_flops', margin=0.4),
    claim('time of a step at least 0.3 of the two-view one less', 'relative_time', margin=0.3),
    claim(
      'linear probe at least 5 points better than untrained', 'probe_fp', 'untrained', margin=5.0
    ),
  )
  config.reported = (
    'Better than SimCLR, MoCo v2, BYOL and SimSiam with less time and memory, most for small networks and '
    'few images; competitive on the whole of ImageNet.'
  )
  return config


def claim(
  statement: str,
  metric: str,
  baseline: str = 'SimSiam',
  method: str = 'single branch',
  margin: float = 0.0,
) -> dict:
  """Returns the claim that the method is better by `margin`; costs are better where they are lower."""
  return dict(
    statement=statement, metric=metric, baseline=baseline, method=method, margin=margin,
    higher_is_better=not metric.startswith('relative_'),
  )  # fmt: skip
