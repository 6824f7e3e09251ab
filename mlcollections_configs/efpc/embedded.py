"""EFPC on documents that state facts among the prose that comes with Python, with an oracle for a teacher.

  python -m experiments.efpc

2400 documents shortened for nothing in particular, and up to as many shortened for a question on one of their
facts. An encoder of two layers from scratch, all rows the same number of steps.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(
    name='facts', count=2400, test_count=100, train_size=2400, vocab_size=2048, length=160,
    instruction_length=16,
  )  # fmt: skip
  config.model = dict(
    name='bert_base', vocab_size=2048, max_length=160, width=64, depth=2, num_heads=4
  )
  config.fan_in_scaled = ('layer_.*/kernel',)
  config.recipe = dict(
    epochs=2,
    batch_size=8,
    optimizer=dict(name='adam', betas=(0.9, 0.98)),
    schedule=dict(name='cosine', base=3e-3, warmup_epochs=0.2),
  )
  config.log_every = 50
  config.added = (0.0, 0.01, 0.1, 1.0)
  config.rates = (0.25,)
  config.claims = claims()
  config.reported = (
    'LongBench, questions on one document, at 4x: F1 4.8 % (relative) above LLMLingua-2 with 1 % more data '
    'and 11.4 % with 10 %.'
  )
  return config


def claims() -> tuple:
  """Returns the claims."""
  base, ten = 'base', 'base + 10 %'
  found = [
    ('10 % more: at least 15 points more answers stay at 4x', 'retention_4x', base, ten, 15.0),
    ('10 % more: F1 without instruction within 2 points', 'agnostic_f1_4x', base, ten, -2.0),
    (
      '10 % more: answers without instruction within 2 points',
      'agnostic_retention_4x', base, ten, -2.0,
    ),
    ('100 % more: not below 10 %, 4x', 'retention_4x', ten, 'base + 100 %', 0.0),
    ('1 % more: above base, 4x', 'retention_4x', base, 'base + 1 %', 0.0),
  ]  # fmt: skip
  names = ('statement', 'metric', 'baseline', 'method', 'margin')
  return tuple(dict(zip(names, own)) for own in found)
