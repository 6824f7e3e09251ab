"""Long-tail settings that train in seconds, for the tests of the experiments."""

import numpy as np

from experiments.harness import launcher

PAPERS = ('dive', 'gml', 'btm')


def tiny(paper='gml', *runs, **changes):
  """Returns the embedded setting with few digits and one epoch a stage; `changes` are values by key."""
  values = {
    'data.imbalance.max_count': 40, 'data.imbalance.ratio': 10.0, 'data.imbalance.test_per_class': 8,
    'model.hidden': (8,), 'groups.many': 30, 'groups.few': 10, 'network.epochs': 1,
  }  # fmt: skip
  recipes = {'gml': ('classifier',), 'btm': ('fine_tuning', 'crt', 'second'), 'dive': ()}[paper]
  values |= {f'{recipe}.epochs': 1 for recipe in recipes}
  values |= {'runs': runs} if runs else {}
  values |= {key.replace('__', '.'): value for key, value in changes.items()}
  if 'model' in changes:
    del values['model.hidden']
  return launcher.load(paper, 'embedded', [f'{key}={value}' for key, value in values.items()])


# A small network with batch norms.
CONVOLUTIONAL = {'name': 'cifar_resnet18', 'stage_sizes': (1,), 'strides': (2,), 'width': 4}


def save_features(path, train=60, test=30, classes=3, **changes):
  """Writes features of classes that are easy to tell apart; returns the path."""
  rng = np.random.default_rng(0)
  arrays = {}
  for split, count in (('train', train), ('test', test)):
    labels = np.arange(count) % classes
    if split == 'train':
      labels = np.minimum(np.arange(count) // (count // 2), 1) + (np.arange(count) >= count - 6)
    arrays[f'{split}_labels'] = labels
    arrays[f'{split}_features'] = rng.normal(size=(count, 4)) + 3 * np.eye(classes, 4)[labels]
  arrays |= changes
  np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
  return str(path)
