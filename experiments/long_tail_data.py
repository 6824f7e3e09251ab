"""The data of a long-tail experiment, from its configuration or from a user's own features."""

import pathlib
import zipfile
import zlib
from collections.abc import Sequence
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
    validation: published validation records, where there are some and they were asked for.
    counts: training images of each class, `[num_classes]`.
  """

  train: data.Source
  test: data.Source
  validation: data.Source | None
  counts: np.ndarray


def load_sources(config: ConfigDict, *, validation: bool = False) -> Sources:
  """Returns the data of `config.data`; `data.long_tail.kind` says where the imbalance comes from.

  - 'split': all records of a small set; `test_per_class` of each class are drawn for the test, then the
    training records with exponential counts. Both depend on the seed.
  - 'exponential', 'step': the training split, reduced by the published selection (legacy NumPy seed
    `selection_seed`), and the whole test split.
  - 'listed': files named by published text lists; `data.{train,test,validation}_options` are those of
    `data.ListedImages`. Those of `validation` are read only if it is set.
  - 'features': the arrays of `config.features`, see `with_features`.

  Raises:
    ValueError: if batches do not divide over the devices, or the data are not what the configuration says.
    FileNotFoundError: if data are not there.
  """
  mesh = training.mesh(config)
  for name, stage in config.stages.items():
    parallel.check_batch_size(stage.batch_size, mesh, f'stages.{name}.batch_size')
  parallel.check_batch_size(config.eval_batch_size, mesh, 'eval_batch_size')
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
      data.ListedImages(**own[f'{split}_options'], num_classes=classes)
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
  if tail.kind == 'listed':
    training.check_size('data.train_size', own.train_size, train)
  held_out = None
  if validation and own.get('validation_options'):
    held_out = data.ListedImages(**own.validation_options, num_classes=classes)
  reader = training.reading(config, 'train')['transform']
  batch = next(data.epoch_batches(long_tail.subset(train, np.arange(2)), 2, transform=reader))
  data.check_batch(batch, num_classes=classes, image_shape=own.stored_image)
  return Sources(train, test, held_out, counts)


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


def read_features(path: str, complete: Sequence[str] = ('train', 'test')) -> dict[str, np.ndarray]:
  """Returns a user's own features: `{train,test}_features` float32 `[records, dim]` and `..._labels`.

  Args:
    path: an npz file. Its classes are 0 to the largest training label.
    complete: the splits that must have records of every class.

  Raises:
    ValueError: for a file without these arrays, or arrays that do not fit together; it names the file, and
      the array.
  """
  names = [f'{split}_{what}' for split in ('train', 'test') for what in ('features', 'labels')]
  if not pathlib.Path(path).is_file():
    raise ValueError(f'features={path}: there is no such file; expected npz with {names}.')
  try:
    if not zipfile.is_zipfile(path):
      raise ValueError('another kind of file, or cut off')
    with np.load(path, allow_pickle=False) as file:
      held = list(file)
      arrays = {name: file[name] for name in names if name in held}
  except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(f'features={path}: not a whole npz file with {names}: {error}.') from None
  if missing := [name for name in names if name not in held]:
    raise ValueError(f'features={path} lacks {missing}; it holds {held}.')
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
    try:
      counts = long_tail.class_counts(arrays[f'{split}_labels'], classes, allow_empty=True)
    except ValueError as error:
      raise ValueError(f'features={path}: {split}_labels: {error}') from None
    empty = np.flatnonzero(counts == 0).tolist()
    if empty and split in complete:
      raise ValueError(
        f'features={path}: {split}_labels: class {empty[0]} of 0..{classes - 1} has no records '
        f'({len(empty)} such classes); number the classes that remain anew.'
      )
  return arrays


def with_features(config: ConfigDict) -> ConfigDict:
  """Returns the configuration that runs on `config.features` in place of images, if there are some.

  The backbone is the identity, so that every stage trains a linear classifier on the features as they are
  (bring them to a sensible scale); nothing is augmented, patterns of the backbone's modules are dropped, and
  so are the claims, whose margins belong to the setting's own data.
  """
  if not config.features:
    return config
  arrays = read_features(config.features)
  records, dim = arrays['train_features'].shape
  own = config.copy_and_resolve_references()
  with own.unlocked():
    own.model.backbone = {'name': 'linear'}
    own.augment, own.claims = {'kind': 'none'}, ()
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
