"""ACSR on digits: 0 to 4 are the base classes, 5 to 9 the novel ones, 5-way 1-shot.

  python -m experiments.acsr

A narrow wide residual network with one block a stage; all but the last stage is frozen and, without
augmentation, computed once for all images. 100 episodes, eight fine-tunings of each: 200 CPU seconds.
"""

from ml_collections import ConfigDict

from mlcollections_configs.long_tail import claim


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = ConfigDict()
  config.seed = 0
  config.networks = ('backbone',)
  config.network = dict(backbone=backbone())

  # None: no pass over base images; 0: the pass alone.
  config.betas = (None, 0.0, 0.1, 0.5)
  config.ensemble_betas = (0.1,)
  config.members = 4
  config.episodes = dict(count=100, num_ways=5, num_shots=1, num_queries=15, per_call=20)
  config.finetune = dict(
    trained='last_stage',
    dropout=0.5,
    steps=100,
    optimizer=dict(name='sgd', learning_rate=0.1, momentum=0.9, weight_decay=1e-4),
    base_batch=64,
    smoothing=0.1,
    augment=None,
    at_once=4,
  )
  config.base_limit = None
  config.cosine_images = 256
  config.eval_batch_size = 256
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.pictured = ('plain', 'SR 0.1', 'EnSR 0.1')
  config.claims = claims()
  return config


def backbone() -> dict:
  """Returns the section of the pre-trained network."""
  return dict(
    task='classification',
    model=dict(
      name='wrn28_10',
      stage_sizes=(1, 1, 1),
      widths=(12, 16, 32),
      strides=(1, 2, 2),
      stem_width=12,
      num_classes=5,
      conv='matmul',
    ),
    checkpoint='',
    data=dict(
      name='digits',
      base_split='train',
      base_options=dict(test_size=1),
      base_classes=(0, 1, 2, 3, 4),
      novel_split='train',
      novel_options=dict(test_size=1),
      novel_classes=(5, 6, 7, 8, 9),
      train_size=901,
      novel_size=895,
      stored_image=(8, 8, 1),
      image_size=8,
      channels=1,
      mean=0.305,
      std=0.376,
    ),
    batch_size=64,
    epochs=20,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=5e-4),
    schedule=dict(name='cosine', base=0.05),
    log_every=100,
    checkpoint_every=1000,
  )


def claims() -> tuple[dict, ...]:
  """Returns what must hold: features drift less, and an ensemble is no worse than its members."""
  return (
    claim(
      'SR 0.1: drift (1 - cosine) at least 25 % below beta 0',
      'drift_ratio', 'beta 0', 'SR 0.1', 0.25, higher=False,
    ),
    claim('SR 0.1: drift below plain fine-tuning', 'drift', 'plain', 'SR 0.1', 0.0, higher=False),
    claim('SR 0.5: drift below SR 0.1', 'drift', 'SR 0.1', 'SR 0.5', 0.0, higher=False),
    claim(
      "EnSR: mean accuracy not below its members'",
      'acc_mean', 'EnSR 0.1 members', 'EnSR 0.1', 0.0,
    ),
    claim(
      "EnSR: ten worst episodes within 0.5 points of its members'",
      'acc_10', 'EnSR 0.1 members', 'EnSR 0.1', -0.5,
    ),
  )  # fmt: skip
