"""SSQL against SimSiam on pasted digits, at equal steps; some six minutes of CPU time.

Each of 1297 training digits lies at a random place and scale on a plain 16x16 canvas; the 2000 test images
show 500 others four times. A thin network (8, 16, 32 channels) has little redundancy that would hide what
quantization takes. With `--config.runs=base,ssql,base*2` SimSiam also runs for as long as SSQL takes (a step
of SSQL is two of SimSiam).
"""

from ml_collections import ConfigDict

from mlcollections_configs import views


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.data = dict(name='pasted_digits', test_options=dict(pastes=4))
  config.augment = views.pasted_digits()

  config.base = 'simsiam'
  config.model = dict(name='cifar_resnet18', stage_sizes=(1, 1, 1), width=8, strides=(2, 2, 2))
  config.heads = dict(hidden=128, features=128, predictor=64)

  config.recipe = dict(
    epochs=100,
    batch_size=128,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=5e-4),
    schedule=dict(name='cosine_per_epoch', base=0.2),
  )
  config.log_every = 50
  config.checkpoint_every = 300

  config.eval = dict(bits=('8w8a', '5w5a', '4w4a', '3w3a', '2w4a'), k=20)
  config.claims = (
    claim('drop of the probe from float to 2w4a at least 5 points smaller', 'drop_2w4a', 5.0, False),
    claim('linear probe at 2w4a is not lower', 'probe_2w4a', 0.0),
    claim('centered cosine of float and 2w4a features is at least 0.05 higher', 'cosine_2w4a', 0.05),
  )  # fmt: skip
  config.reported = (
    'Large gains at few bits over self-supervised baselines (CIFAR, ImageNet), accuracy in float '
    'equal or better in most cases, by one pretraining for all bit-widths.'
  )
  return config


def claim(statement: str, metric: str, margin: float, higher_is_better: bool = True) -> dict:
  """Returns the claim that SSQL is better by `margin` than the method that it builds on."""
  return dict(statement=statement, metric=metric, margin=margin, higher_is_better=higher_is_better)
