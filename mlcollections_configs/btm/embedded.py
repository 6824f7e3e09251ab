"""BTM on long-tailed digits (ratio 50) with a perceptron: six subsets of at most 5 images a class; a minute.

  python -m experiments.btm

A subset has 44 images; at batch 16 an epoch of the fine-tuning is two steps and leaves 12 images out, other
ones each time. Second stages: a class-balanced classifier (cRT), and MiSLAS' label-aware smoothing with
learnable weight scaling, each over the network of the first stage and over the merged one.
"""

from ml_collections import ConfigDict

from mlcollections_configs import long_tail
from mlcollections_configs.long_tail import claim

SCALED = dict(head='scaled', fresh=('head/scale',), frozen=('backbone/.*',))


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = long_tail.base()
  long_tail.set_digits(config, ratio=50.0)
  fine_tuning = long_tail.recipe(60, 16, 0.02, 5e-4)
  second = long_tail.recipe(30, 32, 0.1, 5e-4, 'cosine_per_epoch')
  long_tail.set_stages(
    config,
    first_stages(long_tail.digits_recipe(), fine_tuning, cap=5)
    | classifier_stages(long_tail.digits_recipe(epochs=30))
    | second_stages(second, factor=0.2, head=0.3, tail=0.0),
  )
  config.merged = dict(of='balanced', count=6, vmapped=True, recompute_batch_stats=False)
  config.pictured = ('CE', 'merged', 'merged + cRT')
  config.claims = (
    claim(
      'harmonic mean of the merged network at least 3 above CE', 'harmonic', 'CE', 'merged', 3.0
    ),
    claim('mean recall at least 1 point above CE', 'mean', 'CE', 'merged', 1.0),
    claim('mean at most 0.5 below a single subset', 'mean', 'single subset', 'merged', -0.5),
  )
  return config


def first_stages(
  first: dict, fine_tuning: dict, *, cap: int, mixup: float = 0.0, **options
) -> dict:
  """Returns the long-tailed training and the balanced fine-tuning of all that it trains.

  `options` are of both, but for those that say where the long-tailed training starts from.
  """
  title = 'CE + mixup' if mixup else 'CE'
  start = {k: options.pop(k) for k in ('pretrained', 'fresh') if k in options}
  return dict(
    stage1=long_tail.stage(title, 'baseline', mixup=mixup, **first, **start, **options),
    balanced=long_tail.stage(
      'balanced', 'reference', mixup=mixup, cap=cap, start='stage1', **fine_tuning, **options
    ),
  )


def classifier_stages(recipe: dict) -> dict:
  """Returns class-balanced re-training of the classifier (cRT) over both networks."""
  options = dict(sampler='class_balanced', **recipe, **long_tail.CLASSIFIER)
  return dict(
    crt_stage1=long_tail.stage('CE + cRT', 'reference', start='stage1', **options),
    crt_merged=long_tail.stage('merged + cRT', 'reference', start='merged', **options),
  )


def second_stages(
  recipe: dict,
  *,
  factor: float,
  head: float,
  tail: float,
  mixup: float = 0.0,
  eval_mode: tuple[str, ...] = (),
) -> dict:
  """Returns MiSLAS' second stage over both networks.

  Label-aware smoothing, class-aware sampling, and learnable weight scaling: the classes' factors learn at the
  given rate, the classifier at `factor` times that. Batch statistics of the frozen backbone go on adapting,
  but for those of `eval_mode`.
  """
  loss = dict(name='label_aware_smoothing', head=head, tail=tail, shape='concave')
  recipe = dict(recipe, optimizer=dict(recipe['optimizer']))
  recipe['optimizer']['lr_multipliers'] = (('head/(kernel|bias)', factor),)
  options = dict(loss=loss, sampler='class_aware', mixup=mixup, **recipe, **SCALED)
  options['eval_mode'] = eval_mode
  return dict(
    las_stage1=long_tail.stage('CE + LAS', 'reference', start='stage1', **options),
    las_merged=long_tail.stage('merged + LAS', 'reference', start='merged', **options),
  )
