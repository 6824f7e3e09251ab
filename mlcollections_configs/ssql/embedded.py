"""SSQL against SimSiam on pasted digits, at equal steps.

  python -m experiments.ssql

Some six minutes of CPU time. Each of 1297 training digits lies at a random place and scale on a plain
16x16 canvas; the 2000 test images show 500 others four times. A thin network (8, 16, 32 channels) has little
redundancy that would hide what quantization takes. With `--config.runs=["base","ssql","base*2"]` SimSiam also
runs for as long as SSQL takes (a step of SSQL is two of SimSiam).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = ConfigDict()
  config.seed = 0
  config.base = 'simsiam'
  config.runs = ('base', 'ssql')

  config.data = dict(
    name='pasted_digits',
    train_split='train',
    test_split='test',
    train_options=dict(),
    test_options=dict(pastes=4),
    train_size=1297,
    stored_image=(16, 16, 1),
    image_size=16,
    channels=1,
  )
  config.augment = dict(
    scale=(0.4, 1.0),
    jitter=None,
    grayscale_probability=0.0,
    blur_probability=0.0,
    flip_probability=0.0,
    mean=0.205,
    std=0.302,
    contrast=(0.6, 1.4),
    brightness=(-0.4, 0.4),
  )

  config.model = dict(
    backbone=dict(name='cifar_resnet18', stage_sizes=(1, 1, 1), width=8, strides=(2, 2, 2)),
    projector=dict(hidden=128, features=128),
    predictor_hidden=64,
  )
  config.momentum = 0.99  # of BYOL's and MoCo's target network
  config.queue_size = 4096  # MoCo's
  config.temperature = 0.2  # MoCo's
  config.bits = dict(weight=(2, 8), activation=(4, 8))
  config.reverse_bits = dict(weight=(4, 16), activation=(4, 16))
  config.reverse_float_term = False

  config.batch_size = 128
  config.epochs = 100
  config.optimizer = dict(name='sgd', momentum=0.9, weight_decay=5e-4)
  config.schedule = dict(name='cosine_per_epoch', base=0.2)
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.log_every = 50
  config.checkpoint_every = 300

  config.eval = dict(
    bits=('8w8a', '5w5a', '4w4a', '3w3a', '2w4a'),
    calibration=256,
    batch_size=512,
    k=20,
    probe=dict(name='logistic'),
  )
  config.claims = (
    dict(
      statement='drop of the linear probe from float to 2w4a is at least 5 points smaller',
      metric='drop_2w4a',
      higher_is_better=False,
      margin=5.0,
    ),
    dict(
      statement='linear probe at 2w4a is not lower',
      metric='probe_2w4a',
      higher_is_better=True,
      margin=0.0,
    ),
    dict(
      statement='centered cosine of float and 2w4a features is at least 0.05 higher',
      metric='cosine_2w4a',
      higher_is_better=True,
      margin=0.05,
    ),
  )
  return config
