"""Files of features: what goes in comes out, and nothing that does not fit is trained on."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from etils.epath import testing

from jaxlab import data

SUFFIXES = ('.npz', '.array_record')
HEADER = data.FeatureHeader(
  network='a1', data='b2', layers='0+1', shape=(5, 4), dtype='float32', count=9, num_classes=3
)


def arrays(dtype='float32'):
  rng = np.random.default_rng(0)
  return rng.standard_normal((9, 5, 4)).astype(dtype), rng.integers(0, 3, 9).astype(np.int32)


def written(tmp_path, suffix='.npz', header=HEADER, features=None, labels=None):
  own = arrays(header.dtype)
  features = own[0] if features is None else features
  labels = own[1] if labels is None else labels
  path = tmp_path / f'train{suffix}'
  data.write_feature_file(path, data.in_batches(features, labels, 4), header)
  return path


@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_what_is_written_is_read(tmp_path, suffix, dtype):
  header = dataclasses.replace(HEADER, dtype=dtype)
  features, labels = arrays(dtype)
  # Wider values are brought to the header's type.
  path = written(tmp_path, suffix, header, features.astype(np.float64))
  found = data.FeatureFile(path, {'network': 'a1', 'data': 'b2'})
  assert found.header == header and len(found) == 9 and found.num_classes == 3
  np.testing.assert_array_equal(found.labels, labels)
  np.testing.assert_array_equal(data.source_labels(found), labels)
  some = found.gather(np.array([7, 2]))
  np.testing.assert_array_equal(some['features'], features[[7, 2]])
  np.testing.assert_array_equal(some['label'], labels[[7, 2]])
  record = found[8]
  np.testing.assert_array_equal(record['features'], features[8])
  assert (record['label'], record['index']) == (labels[8], 8)
  assert record['features'].dtype == np.dtype(dtype)
  assert header.record_bytes == features[0].nbytes
  together = [np.concatenate(parts) for parts in zip(*found.batches(4), strict=True)]
  np.testing.assert_array_equal(together[0], features)
  assert [path.name for path in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_file_is_read_in_a_narrower_type_as_if_it_were_written_in_it(tmp_path, suffix):
  wide = data.FeatureFile(written(tmp_path / 'a', suffix))
  narrow = dataclasses.replace(HEADER, dtype='float16')
  held = data.FeatureFile(written(tmp_path / 'b', suffix, narrow, arrays()[0]))
  found = wide.astype('float16')
  assert found.header == held.header and wide.header == HEADER and wide.astype('float32') is wide
  for own, other in ((found[4], held[4]), *((x.gather([7, 2]) for x in (found, held)),)):
    assert own['features'].dtype == np.float16
    for name in own:
      np.testing.assert_array_equal(own[name], other[name])
  np.testing.assert_array_equal(*(next(x.batches())[0] for x in (found, held)))
  for own in (found, held):
    with pytest.raises(ValueError, match="dtype='float32': expected no wider one than float16"):
      own.astype('float32')
  large = np.where(np.arange(9)[:, None, None] == 6, 1e5, np.zeros((9, 5, 4)))
  with pytest.raises(ValueError, match='not finite in float16, the first is record 6'):
    data.FeatureFile(written(tmp_path / 'c', suffix, features=large)).astype('float16')


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_features_of_another_network_or_other_data_are_refused(tmp_path, suffix):
  path = written(tmp_path, suffix)
  with pytest.raises(ValueError, match="network 'a1', expected 'zz'; data 'b2', expected 'yy'"):
    data.FeatureFile(path, {'network': 'zz', 'data': 'yy', 'layers': '0+1'})


@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize('left', [0.0, 0.3, 0.9])
def test_files_that_are_cut_off_are_refused(tmp_path, suffix, left):
  path = written(tmp_path, suffix)
  whole = path.read_bytes()
  path.write_bytes(whole[: int(left * len(whole))])
  with pytest.raises(ValueError, match='train'):
    data.FeatureFile(path)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_damaged_files_are_refused(tmp_path, suffix):
  path = written(tmp_path, suffix)
  whole = bytearray(path.read_bytes())
  place = whole.index(arrays()[0][4].tobytes()[:12])
  whole[place + 2] ^= 0xFF
  path.write_bytes(whole)
  with pytest.raises(ValueError, match=r'train|record'):
    data.FeatureFile(path)


@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize(
  'changes, message',
  [
    ({'labels': np.zeros(8, int)}, r'features \(4, 5, 4\) and 4 labels|features \(1, 5, 4\) and 0'),
    ({'labels': np.full(9, 3)}, 'out of range 0..2'),
    ({'labels': np.full(9, 0.5)}, 'no integers'),
    ({'features': np.zeros((9, 5, 3))}, r'\[records, 5, 4\]'),
    ({'features': np.zeros((8, 5, 4)), 'labels': np.zeros(8, int)}, '8 records, but the header says 9'),
    ({'features': np.zeros((12, 5, 4)), 'labels': np.zeros(12, int)}, '12 records, but the header says 9'),
    ({'features': np.where(np.arange(9)[:, None, None] == 6, np.nan, np.zeros((9, 5, 4)))}, 'record 6'),
    ({'features': np.full((9, 5, 4), 1e39)}, 'not finite in float32, the first is record 0'),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_not_written_and_the_old_file_stays(
  tmp_path, suffix, changes, message
):
  path = written(tmp_path, suffix)
  before = path.read_bytes()
  with pytest.raises(ValueError, match=message):
    written(tmp_path, suffix, **changes)
  assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'label': np.zeros(8, np.int32)}, '8 labels for features of 9 records'),
    ({'features': np.full((9, 5, 4), np.inf, np.float32)}, 'not finite'),
    ({'features': np.zeros((9, 5, 4), np.float16)}, 'features are float16, not float32'),
    ({'features': np.zeros((7, 5, 4), np.float32), 'label': np.zeros(7, int)}, '7 records, but'),
    ({'header': np.array('{}')}, 'no header of features'),
    (
      {'header': np.array(HEADER.to_json().replace('"format": 1', '"format": 2'))},
      'another format',
    ),
    ({'header': None}, 'no whole file of features'),
  ],
)
def test_files_of_other_programs_are_looked_at(tmp_path, changes, message):
  features, labels = arrays()
  own = {'features': features, 'label': labels, 'header': np.array(HEADER.to_json()), **changes}
  path = tmp_path / 'train.npz'
  np.savez(path, **{name: array for name, array in own.items() if array is not None})
  with pytest.raises(ValueError, match=message):
    data.FeatureFile(path)


@pytest.fixture
def bucket(tmp_path):
  """A bucket, `gs://bucket`, which is a folder of this machine."""

  def local(call, *paths, **options):
    return call(*(str(own).replace('gs://', f'{tmp_path}/') for own in paths), **options)

  names = ('exists', 'isdir', 'makedirs', 'open', 'remove', 'replace')
  with testing.mock_epath(**dict.fromkeys(names, local)):
    yield tmp_path / 'bucket'


def test_files_on_buckets_are_written_and_read_there(bucket, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  data.write_feature_file('gs://bucket/run/train.npz', data.in_batches(*arrays(), 4), HEADER)
  assert [str(own.relative_to(bucket)) for own in bucket.rglob('*.*')] == ['run/train.npz']
  found = data.FeatureFile('gs://bucket/run/train.npz', {'network': 'a1'})
  np.testing.assert_array_equal(found.gather(np.arange(9))['features'], arrays()[0])
  with pytest.raises(ValueError, match=r'gs://bucket/train.array_record: expected \.npz'):
    data.write_feature_file('gs://bucket/train.array_record', [], HEADER)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_what_a_killed_process_left_is_written_over(tmp_path, suffix):
  (tmp_path / f'train{suffix}.partial').write_bytes(b'of before')
  written(tmp_path, suffix)
  assert [path.name for path in tmp_path.iterdir()] == [f'train{suffix}']


def test_a_file_is_held_once_when_it_is_opened_and_never_when_it_is_written(tmp_path):
  header = dataclasses.replace(HEADER, shape=(50, 64), count=600)
  size, path = 600 * header.record_bytes, tmp_path / 'train.npz'
  parts = ((np.zeros((60, 50, 64), np.float32), np.zeros(60, int)) for _ in range(10))
  tracemalloc.start()
  try:
    data.write_feature_file(path, parts, header)
    assert tracemalloc.get_traced_memory()[1] < 0.6 * size
    tracemalloc.reset_peak()
    found = data.FeatureFile(path)
    assert tracemalloc.get_traced_memory()[1] < 1.5 * size
  finally:
    tracemalloc.stop()
  assert len(found) == 600


def test_files_that_cannot_be_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'nothing\.npz'):
    data.FeatureFile(tmp_path / 'nothing.npz')
  with pytest.raises(ValueError, match=r'expected a file \.npz or \.array_record'):
    written(tmp_path, '.pkl')
  for wrong in ({'dtype': 'int8'}, {'shape': ()}, {'count': 0}, {'views': 2}, {'views': 0}):
    with pytest.raises(ValueError, match=next(iter(wrong))):
      dataclasses.replace(HEADER, **wrong)


def test_batches_are_loaded_as_of_every_source(tmp_path):
  found = data.FeatureFile(written(tmp_path))
  loader = data.make_loader(found, batch_size=3, seed=0)
  try:
    batch = next(iter(loader))
  finally:
    loader.close()
  np.testing.assert_array_equal(batch['features'], arrays()[0][batch['index']])
