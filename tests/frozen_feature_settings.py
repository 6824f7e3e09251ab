"""Settings on frozen features that are fitted in seconds, for the tests of the experiments."""

import numpy as np

from experiments.harness import launcher


def tiny(setting='embedded', **changes):
  """Returns a setting with two draws and a search of two iterations; `changes` are values by key."""
  values = {
    'search.search_epochs': 2, 'search.threshold_epochs': 20, 'search.tolerance': 3.0, 'train.epochs': 20,
    'num_copies': 3, 'eval.num_copies': 2, 'draws': 2, 'representations': ('raw',), 'shots': (5,),
  }  # fmt: skip
  values |= {key.replace('__', '.'): value for key, value in changes.items()}
  return launcher.load('ibm2', setting, [f'{key}={value}' for key, value in values.items()])


def save_features(path, **changes):
  """Writes features of three classes that are easy to tell apart; returns the path."""
  rng, arrays = np.random.default_rng(0), {}
  for split, count in (('train', 12), ('test', 30)):
    labels = np.arange(count) % 3
    arrays[f'{split}_labels'] = labels
    arrays[f'{split}_features'] = 5 * np.eye(3, 6)[labels] + rng.standard_normal((count, 6))
  arrays |= changes
  np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
  return str(path)
