"""The data of a long-tail experiment, from its configuration or from a user's own features."""

import pathlib
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments import supervised, training
from jaxlab import data, parallel
from jaxlab.data import long_tail


class Sources(NamedTuple):
  """The data of an experiment.

  Attributes:
    train: long-tailed records.
    test: records of every class.
    validation: published validation records, where there are some.
    counts: training images of each class, `[num_classes]`.
  """

  train: data.Source
  test: data.Source
  validation: data.Source | None
  counts: np.ndarray


def load_sources(config: ConfigDict) -> Sources:
  """Returns the data of `config.data`; `data.long_tail.kind` says where the imbalance comes from.

  - 'split': all records of a small set; `test_per_class` of each class are drawn for the test, then the
    training records with exponential counts. Both depend on the seed.
  - 'exponential', 'step': the training split, reduced by the published selection (legacy NumPy seed
    `selection_seed`), and the whole test split.
  - 'listed': files named by published text lists; `data.{train,test,validation}_options` are those of
    `data.long_tail.ListedImages`.
  - 'features': the arrays of `config.features`, see `with_features`.

  Raises:
    ValueError: if batches do not divide over the devices, or the data are not what the configuration says.
    FileNotFoundError: if data are not there.
  """
  for name, stage in config.stages.items():
    try:
      parallel.check_batch_size(stage.batch_size, training.mesh(config))
    except ValueError as error:
      raise ValueError(f'stages.{name}.batch_size: {error}') from None
  own, tail = config.data, config.data.long_tail
  classes = own.num_classes
  if tail.kind == 'features':
    arrays = read_features(config.features)
    train, test = (
      data.InMemory(
        {'image': arrays[f'{split}_features'][:, None, None], 'label': arrays[f'{split}_labels']},
        classes,
      )
      for split in ('train', 'test')
    )
  elif tail.kind == 'listed':
    train, test = (
      long_tail.ListedImages(**own[f'{split}_options'], num_classes=classes)
      for split in ('train', 'test')
    )
  else:
    train, test = (
      data.load(own.name, own[f'{split}_split'], **own[f'{split}_options'])
      for split in ('train', 'test')
    )
    if tail.kind == 'split':
      train, test = pooled_split(train, test, config)
    else:
      chosen = long_tail.select_imbalanced(
        long_tail.source_labels(train), supervised.nominal_counts(config), tail.selection_seed
      )
      train = long_tail.subset(train, chosen)
  counts = long_tail.class_counts(long_tail.source_labels(train), classes)
  if tail.kind == 'listed' and len(train) != own.train_size:
    raise ValueError(
      f'data.train_size={own.train_size}, but the list names {len(train)} training images: set '
      f'--config.data.train_size={len(train)}.'
    )
  validation = None
  if own.get('validation_options'):
    validation = long_tail.ListedImages(**own.validation_options, num_classes=classes)
  reader = training.reading(config, 'train')['transform']
  batch = next(data.epoch_batches(long_tail.subset(train, np.arange(2)), 2, transform=reader))
  data.check_batch(batch, num_classes=classes, image_shape=own.stored_image)
  return Sources(train, test, validation, counts)


def pooled_split(
  train: data.Source, test: data.Source, config: ConfigDict
) -> tuple[data.Source, data.Source]:
  """Returns long-tailed training and balanced test records out of both splits of a set in memory."""
  parts = [data.materialize(source) for source in (train, test)]
  pool = data.InMemory(
    {name: np.concatenate([part[name] for part in parts]) for name in ('image', 'label')},
    config.data.num_classes,
  )
  tail = config.data.long_tail
  chosen = long_tail.split_long_tailed(
    pool.arrays['label'],
    max_count=tail.max_count,
    ratio=tail.ratio,
    test_per_class=tail.test_per_class,
    seed=config.seed,
  )
  return long_tail.subset(pool, chosen[0]), long_tail.subset(pool, chosen[1])


def read_features(path: str) -> dict[str, np.ndarray]:
  """Returns a user's own features: `{train,test}_features` float32 `[records, dim]` and `..._labels`.

  Raises:
    ValueError: for a file without these arrays, or arrays that do not fit together.
  """
  names = [f'{split}_{what}' for split in ('train', 'test') for what in ('features', 'labels')]
  if not pathlib.Path(path).is_file():
    raise ValueError(f'features={path}: there is no such file; expected npz with {names}.')
  with np.load(path, allow_pickle=False) as file:
    if missing := [name for name in names if name not in file]:
      raise ValueError(f'features={path} lacks {missing}; it holds {list(file)}.')
    arrays = {name: file[name] for name in names}
  for split in ('train', 'test'):
    features, labels = arrays[f'{split}_features'], arrays[f'{split}_labels']
    if features.ndim != 2 or labels.shape != features.shape[:1]:
      raise ValueError(
        f'features={path}: {split}_features {features.shape} and {split}_labels {labels.shape}; expected '
        '[records, dim] and [records].'
      )
    if not np.isfinite(features).all():
      raise ValueError(f'features={path}: {split}_features holds values that are not finite.')
    if not np.issubdtype(labels.dtype, np.integer):
      raise ValueError(f'features={path}: {split}_labels must be integers, got {labels.dtype}.')
    arrays[f'{split}_features'] = features.astype(np.float32)
  if arrays['train_features'].shape[1] != arrays['test_features'].shape[1]:
    raise ValueError(f'features={path}: training and test features differ in their dimension.')
  classes = int(arrays['train_labels'].max(initial=-1)) + 1
  for split in ('train', 'test'):
    long_tail.class_counts(arrays[f'{split}_labels'], classes)
  return arrays


def with_features(config: ConfigDict) -> ConfigDict:
  """Returns the configuration that runs on `config.features` in place of images, if there are some.

  The backbone is the identity, so that every stage trains a linear classifier on the features as they are
  (bring them to a sensible scale); nothing is augmented, patterns of the backbone's modules are dropped.
  """
  if not config.features:
    return config
  arrays = read_features(config.features)
  records, dim = arrays['train_features'].shape
  own = config.copy_and_resolve_references()
  with own.unlocked():
    own.model.backbone = {'name': 'linear'}
    own.augment = {'kind': 'none'}
    own.data = {
      'name': 'features',
      'num_classes': int(arrays['train_labels'].max()) + 1,
      'train_size': records,
      'stored_image': (1, 1, dim),
      'image_size': 1,
      'channels': dim,
      'dtype': 'float32',
      'mean': 0.0,
      'std': 1.0,
      'long_tail': {'kind': 'features'},
    }
    for stage in own.stages.values():
      stage.pretrained = None
      stage.eval_mode = ()
      for field in ('frozen', 'fresh'):
        stage[field] = tuple(p for p in stage[field] if not p.startswith('backbone'))
  return own
