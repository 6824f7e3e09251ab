"""Tables: rows of numbers with a label, from files or embedded, split into training and test records."""

import contextlib
import os
import pathlib
from typing import Any

import numpy as np

from jaxlab.data.sources.source import InMemory

# Tables that come with scikit-learn; the levels of the digits are brought to [0, 1].
EMBEDDED_TABLES = ('digits', 'wine', 'breast_cancer')
SCALINGS = ('none', 'standardize')


def read_table(
  path: str | os.PathLike, num_features: int | None = None, label_column: int = -1
) -> tuple[np.ndarray, np.ndarray]:
  """Reads a table from a file: `.npz`, `.csv`, or LIBSVM's sparse text (also `.bz2`, `.gz`).

  Args:
    path: an npz file holds `features` `[records, dim]` and `labels`; in a csv file a row is a record, and a
      first row that holds a name is left out; a LIBSVM file has lines `label index:value ...`.
    num_features: of a LIBSVM file, whose last columns may be empty; None: as many as occur.
    label_column: of a csv file.

  Returns:
    Features, float32 `[records, dim]`, and labels as they are written: numbers, or texts of a csv file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for a file of another form, or features that are no finite numbers, with the first row.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'there is no table {path}.')
  if path.suffix == '.npz':
    with np.load(path, allow_pickle=False) as file:
      if missing := [name for name in ('features', 'labels') if name not in file.files]:
        raise ValueError(f'{path} lacks {", ".join(missing)}; it holds {", ".join(file.files)}.')
      features, labels = file['features'], file['labels']
  elif path.suffix == '.csv':
    features, labels = _read_csv(path, label_column)
  else:
    from sklearn.datasets import load_svmlight_file

    try:
      sparse, labels = load_svmlight_file(str(path), n_features=num_features)
    except ValueError as error:
      raise ValueError(f'{path} is no table in the format of LIBSVM: {error}') from error
    features = sparse.astype(np.float32).toarray()
  if features.ndim != 2 or labels.shape != features.shape[:1] or not features.size:
    raise ValueError(
      f'{path}: expected features [records, dim] and labels [records], got {features.shape} and '
      f'{labels.shape}.'
    )
  features = features.astype(np.float32)
  if (bad := np.flatnonzero(~np.isfinite(features).all(1))).size:
    raise ValueError(
      f'{path}: {bad.size} rows hold NaN or infinity, the first is row {bad[0]}: fill in or leave '
      'out what is missing.'
    )
  return features, labels


def _read_csv(path: pathlib.Path, label_column: int) -> tuple[np.ndarray, np.ndarray]:
  import csv

  with path.open(newline='', encoding='utf-8-sig') as file:
    lines = [(number, line) for number, line in enumerate(csv.reader(file), 1) if line]
  if not lines:
    raise ValueError(f'{path} is empty.')
  width = len(lines[0][1])
  if not -width <= label_column < width or width < 2:
    raise ValueError(f'{path} has {width} columns: there is no label_column={label_column}.')
  labels, rows = [], []
  for number, line in lines:
    if len(line) != width:
      raise ValueError(f'{path}:{number} has {len(line)} columns, the first line {width}.')
    label = line.pop(label_column)
    try:
      rows.append([float(text) for text in line])
    except ValueError as error:
      if number == lines[0][0]:  # names of the columns
        continue
      raise ValueError(f'{path}:{number}: {error}') from None
    labels.append(label)
  labels = np.array(labels)
  with contextlib.suppress(ValueError):  # names of classes
    labels = labels.astype(np.float64)
  return np.array(rows), labels


def load_table(
  split: str,
  train: str,
  test: str = '',
  *,
  num_features: int | None = None,
  label_column: int = -1,
  test_share: float = 0.3,
  split_seed: int = 42,
  scaling: str = 'none',
) -> InMemory:
  """Returns the 'train' or 'test' records `features` float32 `[dim]`, `label`, `index` of a table.

  Labels are numbered in their order, by the training records.

  Args:
    split: 'train' or 'test'.
    train: a file, see `read_table`; or 'digits', 'wine' or 'breast_cancer', which come with scikit-learn.
    test: a file; empty: a share of the training records is split off at random.
    num_features: see `read_table`, as `label_column`.
    label_column: see `read_table`.
    test_share: of the split.
    split_seed: of the split, scikit-learn's `random_state`.
    scaling: 'none', or 'standardize' by the training records' means and deviations.

  Raises:
    ValueError: for tables that do not fit together, or test labels that no training record has.
    FileNotFoundError: if a file is not there.
  """
  if split not in ('train', 'test'):
    raise ValueError(f"split is {split!r}, expected 'train' or 'test'.")
  if scaling not in SCALINGS:
    raise ValueError(f'scaling is {scaling!r}, expected one of {", ".join(SCALINGS)}.')
  own = {'num_features': num_features, 'label_column': label_column}
  x, y = _embedded(train) if train in EMBEDDED_TABLES else read_table(train, **own)
  if test:
    own['num_features'] = x.shape[1]
    test_x, test_y = read_table(test, **own)
    if test_x.shape[1] != x.shape[1]:
      raise ValueError(f'{test} has {test_x.shape[1]} features, {train} {x.shape[1]}.')
  else:
    from sklearn.model_selection import train_test_split

    x, test_x, y, test_y = train_test_split(x, y, test_size=test_share, random_state=split_seed)
  classes = np.unique(y)
  if unknown := sorted(set(test_y.tolist()) - set(classes.tolist())):
    raise ValueError(f'test labels {unknown[:5]} occur in no training record of {train}.')
  if scaling == 'standardize':
    mean, deviation = x.mean(0), x.std(0)
    deviation[deviation == 0] = 1
    x, test_x = (x - mean) / deviation, (test_x - mean) / deviation
  x, y = (x, y) if split == 'train' else (test_x, test_y)
  arrays = {'features': x.astype(np.float32), 'label': np.searchsorted(classes, y)}
  return InMemory(arrays, len(classes), [_name(label) for label in classes])


def _embedded(name: str) -> tuple[np.ndarray, np.ndarray]:
  from sklearn import datasets

  features, labels = getattr(datasets, f'load_{name}')(return_X_y=True)
  return (features / 16 if name == 'digits' else features), labels


def _name(label: Any) -> str:
  return str(int(label)) if isinstance(label, float) and label == int(label) else str(label)
