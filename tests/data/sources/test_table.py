import bz2

import numpy as np
import pytest

from jaxlab import data


@pytest.fixture(scope='module')
def table():
  rng = np.random.default_rng(0)
  return np.round(rng.normal(size=(12, 4)), 3).astype(np.float32), rng.integers(0, 3, 12)


def written(folder, kind, x, y):
  """Returns the path of a file that holds the table."""
  path = folder / f'table{kind}'
  if kind == '.npz':
    np.savez(path, features=x, labels=y)
  elif kind == '.csv':
    lines = [','.join(map(str, [*row, label])) for row, label in zip(x.tolist(), y.tolist())]
    path.write_text('a,b,c,d,class\n' + '\n'.join(lines) + '\n')
  else:
    lines = [
      f'{label} ' + ' '.join(f'{i}:{value}' for i, value in enumerate(row, 1) if value)
      for row, label in zip(x.tolist(), y.tolist())
    ]
    text = ('\n'.join(lines) + '\n').encode()
    path.write_bytes(bz2.compress(text) if kind == '.bz2' else text)
  return str(path)


@pytest.mark.parametrize('kind', ['.npz', '.csv', '.scale', '.bz2'])
def test_all_files_of_a_table_hold_the_same(kind, table, tmp_path):
  x, y = data.read_table(written(tmp_path, kind, *table))
  assert x.dtype == np.float32
  np.testing.assert_allclose(x, table[0], rtol=1e-6)
  np.testing.assert_array_equal(y, table[1])


def test_the_label_may_stand_in_another_column_and_be_a_name(tmp_path):
  path = tmp_path / 'named.csv'
  path.write_text('cat,1,2\ndog,3,4\n\ncat,5,6\n')
  x, y = data.read_table(path, label_column=0)
  np.testing.assert_array_equal(x, [[1, 2], [3, 4], [5, 6]])
  assert y.tolist() == ['cat', 'dog', 'cat']


def test_sparse_tables_have_the_columns_that_are_said(tmp_path):
  x = np.array([[1, 0, 0, 0], [0, 2, 0, 0]], np.float32)
  path = written(tmp_path, '', x, np.array([-1, 1]))
  assert data.read_table(path)[0].shape == (2, 2)
  np.testing.assert_array_equal(data.read_table(path, 4)[0], x)


def test_labels_are_numbered_by_the_training_records(table, tmp_path):
  x, y = table
  names = np.array([7, -1, 26])[y]
  (tmp_path / 'test').mkdir()
  train = written(tmp_path, '.npz', x, names)
  test = written(tmp_path / 'test', '.csv', x[:5], names[:5])
  sources = [data.load('table', split, train=train, test=test) for split in ('train', 'test')]
  assert sources[0].class_names == ('-1', '7', '26') and [*map(len, sources)] == [12, 5]
  found = sources[1].arrays['label']
  np.testing.assert_array_equal(found, np.array([1, 0, 2])[y[:5]])
  np.testing.assert_allclose(sources[1][3]['features'], x[3], rtol=1e-6)
  odd = written(tmp_path / 'test', '.npz', x[:2], np.array([7, 8]))
  with pytest.raises(ValueError, match=r'test labels \[8\] occur in no training record'):
    data.load('table', 'test', train=train, test=odd)
  narrow = written(tmp_path / 'test', '.npz', x[:2, :3], names[:2])
  with pytest.raises(ValueError, match='has 3 features'):
    data.load('table', 'train', train=train, test=narrow)


def test_a_split_is_that_of_scikit_learn():
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  x, y = load_digits(return_X_y=True)
  expected = train_test_split(x / 16, y, test_size=0.3, random_state=42)
  train, test = (data.load('table', split, train='digits').arrays for split in ('train', 'test'))
  parts = (train['features'], test['features'], train['label'], test['label'])
  for a, b in zip(parts, expected, strict=True):
    np.testing.assert_array_equal(a, b.astype(a.dtype))


def test_standardizing_knows_the_training_records_alone():
  plain, scaled = (
    [data.load('table', s, train='wine', scaling=scaling).arrays for s in ('train', 'test')]
    for scaling in ('none', 'standardize')
  )
  mean, deviation = plain[0]['features'].mean(0), plain[0]['features'].std(0)
  for a, b in zip(plain, scaled, strict=True):
    np.testing.assert_allclose(b['features'], (a['features'] - mean) / deviation, atol=1e-3)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('', 'is empty'),
    ('1\n2\n', 'has 1 columns'),
    ('1,2,0\n3,4\n', r'table.csv:2 has 2 columns, the first line 3'),
    ('1,2,0\n3,x,1\n', r"table.csv:2: could not convert string to float: 'x'"),
    ('1,2,0\n3,nan,1\n', 'NaN or infinity, the first is row 1'),
    ('a,b,c\n', 'expected features'),
  ],
)
def test_a_broken_table_is_named(text, message, tmp_path):
  path = tmp_path / 'table.csv'
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    data.read_table(path)


def test_what_is_not_a_table_is_named(tmp_path):
  (tmp_path / 'a.scale').write_text('1 2 3\n')
  np.savez(tmp_path / 'a.npz', x=np.ones(2))
  for name, message in (('a.scale', 'format of LIBSVM'), ('a.npz', 'lacks features, labels')):
    with pytest.raises(ValueError, match=message):
      data.read_table(tmp_path / name)
  with pytest.raises(FileNotFoundError, match='no table'):
    data.load('table', train=str(tmp_path / 'b.csv'))
  with pytest.raises(ValueError, match="scaling is 'unit'"):
    data.load('table', train='wine', scaling='unit')
  with pytest.raises(ValueError, match="split is 'val'"):
    data.load('table', 'val', train='wine')
