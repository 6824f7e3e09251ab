"""Long-tail settings that train in seconds, for the tests of the experiments."""

import numpy as np

from experiments import btm, dive, gml, launcher

PAPERS = {'dive': dive, 'gml': gml, 'btm': btm}


def tiny(paper='gml', *runs, **data):
  """Returns the embedded setting with few digits and one epoch a stage."""
  config = launcher.load_config(launcher.CONFIGS / paper / 'embedded.py')
  with config.unlocked():
    config.data.long_tail.update(max_count=40, ratio=10.0, test_per_class=8)
    config.model.backbone.hidden = (8,)
    config.groups = {'many': 30, 'few': 10}
    for stage in config.stages.values():
      stage.epochs = 1
    config.runs = runs or config.runs
    config.data.update(data)
  return config


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
