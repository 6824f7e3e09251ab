"""S3L on pasted digits with a small ResNet: 8 pixels, two stages and a network cut short, against 16 pixels.

All 1297 training images are pretrained on by MoCo v2 for equally many epochs; the labels of 20 images of each
digit are used in the fine-tuning alone. A few minutes on two cores.
"""

from ml_collections import ConfigDict

from mlcollections_configs import views


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='pasted_digits', test_options=dict(pastes=4))
  config.augment = views.pasted_digits()

  config.ssl = 'moco'
  config.model = dict(name='cifar_resnet18', stage_sizes=(1, 1, 1), width=16, strides=(1, 2, 2))
  config.heads = dict(hidden=0, features=64)
  config.target = dict(momentum=0.99, queue_size=512, temperature=0.2)
  config.recipe = recipe(30, 128, 0.06, 1e-4, 'cosine_per_epoch')
  config.labeled = dict(per_class=20)

  config.variants = variants(16, 8, 7)
  config.warm_up = dict(recipe=recipe(10, 40, 0.02, 5e-4, 'constant'), head_init='normal')
  config.fine_tuning = dict(recipe=recipe(60, 40, 0.05, 5e-4, 'cosine'))
  config.log_every = 50
  config.checkpoint_every = 500
  config.claims = claims(16, 8)
  config.reported = (
    'Small images, cut networks and small data give a higher accuracy after fine-tuning than pretraining '
    'whole networks at 224 pixels, with several methods, networks and data sets (abstract; tables not seen).'
  )
  return config


def recipe(epochs: int, batch_size: int, base: float, weight_decay: float, schedule: str) -> dict:
  """Returns a training by SGD with momentum 0.9."""
  return dict(
    epochs=epochs,
    batch_size=batch_size,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=weight_decay),
    schedule=dict(name=schedule, base=base),
  )


def variants(full: int, small: int, last_epochs: int) -> tuple[dict, ...]:
  """Returns the rows: full and small images, one after the other, and a network without its last stage."""
  whole, start, end = dict(size=full), dict(size=small), dict(size=full, epochs=last_epochs)
  return (
    dict(name=f'{full} px', stages=(whole,), role='baseline'),
    dict(name=f'{small} px', stages=(start,)),
    dict(name=f'{small}, then {full} px', stages=(start, end)),
    dict(name=f'{full} px, cut', stages=(whole,), last_stage='attached'),
    dict(name=f'{small} px, cut', stages=(start,), last_stage='attached'),
  )


def claims(full: int, small: int) -> tuple[dict, ...]:
  """Returns the claims: half the side and a cut network cost at most 2 points, a stage of full size none."""
  whole, start = f'{full} px', f'{small} px'
  staged, cut = f'{small}, then {full} px', f'{full} px, cut'
  return (
    claim(f'{small} pixels at most 2 points below {full}', whole, start, -2.0),
    claim(f'{small}, then {full} pixels not below {full}', whole, staged),
    claim('the cut network at most 2 points below the whole one', whole, cut, -2.0),
    claim(f'{full} pixels not below the network as drawn', 'untrained', whole),
    claim(f'{small} pixels not below the network as drawn', 'untrained', start),
    claim(f'{small} pixels at least 60 % cheaper', whole, start, 0.6, 'flops'),
    claim('two stages no dearer', whole, staged, 0.0, 'flops'),
    claim('the cut network cheaper', whole, cut, 0.0, 'flops'),
  )


def claim(
  statement: str, baseline: str, method: str, margin: float = 0.0, metric: str = 'fine_tuned'
) -> dict:
  """Returns the claim that a row is better by `margin`; operations are better where they are fewer."""
  return dict(
    statement=statement, metric=metric, baseline=baseline, method=method, margin=margin,
    higher_is_better=metric != 'flops',
  )  # fmt: skip
