"""ACSR on digits: 0 to 4 are the base classes, 5 to 9 the novel ones, 5-way 1-shot.

  python -m experiments.acsr

A narrow wide residual network with one block a stage; all but the last stage is frozen and, without
augmentation, computed once for all images. 100 episodes, eight fine-tunings of each: 200 CPU seconds.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  # All 1796 training digits but one: base and novel images are told apart by their classes.
  every = dict(test_size=1)
  config.data = dict(
    name='digits',
    num_classes=5,
    base_classes=(0, 1, 2, 3, 4),
    novel_classes=(5, 6, 7, 8, 9),
    train_size=901,
    novel_size=895,
    test_split='train',
    train_options=every,
    test_options=every,
  )
  config.model = dict(
    name='wrn28_10', stage_sizes=(1, 1, 1), widths=(12, 16, 32), stem_width=12, conv='matmul'
  )
  config.recipe = dict(
    epochs=20,
    batch_size=64,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=5e-4),
    schedule=dict(name='cosine', base=0.05),
  )

  config.episodes = dict(count=100, num_ways=5, num_shots=1, num_queries=15, per_call=20)
  config.fine_tuning = dict(
    trained='last_stage',
    dropout=0.5,
    steps=100,
    learning_rate=0.1,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
    at_once=4,
  )
  config.base = dict(batch_size=64, judged=256)

  # None: no pass over base images; 0: the pass alone.
  config.betas = (None, 0.0, 0.1, 0.5)
  config.ensemble_betas = (0.1,)
  config.members = 4
  config.eval_batch_size = 256

  # Features drift less, and an ensemble is no worse than its members.
  config.pictured = ('plain', 'SR 0.1', 'EnSR 0.1')
  config.claims = (
    claim(
      'SR 0.1: drift (1 - cosine) at least 25 % below beta 0',
      'drift_ratio', 'beta 0', 'SR 0.1', 0.25, higher=False,
    ),
    claim('SR 0.1: drift below plain fine-tuning', 'drift', 'plain', 'SR 0.1', higher=False),
    claim('SR 0.5: drift below SR 0.1', 'drift', 'SR 0.1', 'SR 0.5', higher=False),
    claim(
      "EnSR: mean accuracy not below its members'", 'acc_mean', 'EnSR 0.1 members', 'EnSR 0.1'
    ),
    claim(
      "EnSR: ten worst episodes within 0.5 points of its members'",
      'acc_10', 'EnSR 0.1 members', 'EnSR 0.1', -0.5,
    ),
  )  # fmt: skip
  config.reported = (
    'Better than earlier methods by a significant margin in mean and worst accuracy, with a smaller '
    'sigma; the ensemble more so (mini-ImageNet, CUB, CIFAR-FS).'
  )
  return config


def claim(
  statement: str,
  metric: str,
  baseline: str,
  method: str,
  margin: float = 0.0,
  higher: bool = True,
) -> dict:
  """Returns the claim that `metric` of row `method` is at least `margin` better than that of `baseline`."""
  return dict(
    statement=statement,
    metric=metric,
    baseline=baseline,
    method=method,
    margin=margin,
    higher_is_better=higher,
  )
