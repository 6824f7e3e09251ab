"""A teacher that tells five groups of digits, students of ten classes from 130 labels; minutes on two cores.

The teacher, a small convolutional network with 128 features, knows 1297 digits as 0-1, 2-3, ..., 8-9 alone:
it stands for a network without labels of the task. The students are four times narrower; the tutor, whose
logits are distilled, is the teacher trained on for the students' labels.
"""

from ml_collections import ConfigDict

from mlcollections_configs.feature_mimicking import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  start = embedded.get_config()
  config = ConfigDict()
  config.teacher = start.teacher
  config.teacher.groups = tuple(label // 2 for label in range(10))
  config.student = start.student
  config.coordinates = dict(count=48, keep=24)
  config.tutor = embedded.recipe(epochs=50, batch_size=32, base=0.02)
  config.rows = rows(beta=3.0)
  config.runs = ('ce', 'kd', 'random', 'random_elsh', 'tcs', 'elsh')
  config.probed = (1, 2, 4, 8, 16, 32, 48)
  config.log_every = 100
  config.claims = claims(margin=0.5)
  config.reported = (
    'ImageNet, one pair of networks: 73.07 %, the best rival 71.99 (from a summary); half the time and three '
    'quarters of the memory of distillation. Random axes are clearly worse.'
  )
  return config


def rows(beta: float) -> dict:
  """Returns the rows: labels, a tutor's logits, coordinates with and without stored bits, random axes."""
  return dict(
    ce=dict(title='CE', axes='none'),
    kd=dict(title='KD', axes='none', alpha=1.0),
    tcs=dict(title='TCS'),
    random=dict(title='random axes', axes='random'),
    elsh=dict(title='TCS + eLSH', beta=beta),
    random_elsh=dict(title='random axes + eLSH', axes='random', beta=beta),
  )


def claims(margin: float) -> tuple[dict, ...]:
  """Returns the claims."""
  return (
    dict(
      statement=f'TCS + eLSH at least {margin:g} points above labels alone', metric='accuracy',
      baseline='CE', method='TCS + eLSH', margin=margin,
    ),
  )  # fmt: skip
