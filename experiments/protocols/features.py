"""A user's own features in place of images."""

import pathlib
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np

from jaxlab import data


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
    if features.ndim != 2 or labels.shape[:1] != features.shape[:1]:
      raise ValueError(
        f'features={path}: {split}_features {features.shape} and {split}_labels {labels.shape}; expected '
        '[records, dim] and [records].'
      )
    if not any(np.issubdtype(features.dtype, kind) for kind in (np.floating, np.integer)):
      raise ValueError(
        f'features={path}: {split}_features has dtype {features.dtype}, expected numbers'
        + (
          ' (bfloat16 is not written to npz: save float32).' if features.dtype.kind == 'V' else '.'
        )
      )
    with np.errstate(over='ignore'):
      arrays[f'{split}_features'] = narrow = features.astype(np.float32)
    wrong = np.argwhere(~np.isfinite(narrow))
    if wrong.size:
      row, column = wrong[0]
      raise ValueError(
        f'features={path}: {split}_features holds values that are not finite in float32, the first in '
        f'row {row}, column {column}: {features[row, column]}.'
      )
    try:
      arrays[f'{split}_labels'] = data.as_labels(labels, f'{split}_labels')
    except ValueError as error:
      raise ValueError(f'features={path}: {error}') from None
  if arrays['train_features'].shape[1] != arrays['test_features'].shape[1]:
    raise ValueError(f'features={path}: training and test features differ in their dimension.')
  classes = int(arrays['train_labels'].max(initial=-1)) + 1
  for split in ('train', 'test'):
    try:
      counts = data.class_counts(arrays[f'{split}_labels'], classes, allow_empty=True)
    except ValueError as error:
      raise ValueError(f'features={path}: {split}_labels: {error}') from None
    empty = np.flatnonzero(counts == 0).tolist()
    if empty and split in complete:
      raise ValueError(
        f'features={path}: {split}_labels: class {empty[0]} of 0..{classes - 1} has no records '
        f'({len(empty)} such classes); number the classes that remain anew.'
      )
  return arrays
