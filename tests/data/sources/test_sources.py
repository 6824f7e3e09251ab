import gzip
import io
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxlab import data
from jaxlab.data.sources import embedded
from jaxlab.data.sources import source as sources


def _images(n, shape=(4, 4, 1)):
  return np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8)


def test_digits_splits_are_disjoint_complete_and_fixed():
  train, test = data.Digits('train', seed=3), data.Digits('test', seed=3)
  assert (len(train), len(test)) == (1297, 500)
  from sklearn.datasets import load_digits

  def multiset(images):
    return sorted(image.tobytes() for image in images)

  everything = np.round(load_digits().images * 255 / 16).astype(np.uint8)
  joined = np.concatenate([train.arrays['image'], test.arrays['image']])
  assert multiset(joined) == multiset(everything)
  np.testing.assert_array_equal(data.Digits('test', seed=3).arrays['image'], test.arrays['image'])
  assert (data.Digits('test', seed=4).arrays['label'] != test.arrays['label']).any()
  record = train[7]
  assert record['image'].shape == (8, 8, 1) and record['image'].dtype == np.uint8
  assert record['label'].dtype == np.int32 and record['index'] == 7
  assert train.num_classes == 10 and train.class_names[3] == '3'


def test_digits_name_a_wrong_split_or_size():
  with pytest.raises(ValueError, match=r"split is 'val', expected one of"):
    data.Digits('val')
  with pytest.raises(ValueError, match='test_size is 1797'):
    data.Digits(test_size=1797)


def _write_fashion(folder, images, labels, prefix='t10k', compress=True):
  header = struct.pack('>BBBB3i', 0, 0, 8, 3, *images.shape)
  files = {
    f'{prefix}-images-idx3-ubyte': header + images.tobytes(),
    f'{prefix}-labels-idx1-ubyte': struct.pack('>BBBBi', 0, 0, 8, 1, len(labels))
    + labels.tobytes(),
  }
  for name, content in files.items():
    if compress:
      (folder / f'{name}.gz').write_bytes(gzip.compress(content))
    else:
      (folder / name).write_bytes(content)


@pytest.mark.parametrize('compress', [True, False])
def test_fashion_mnist_reads_idx_files_from_argument_or_environment(
  tmp_path, monkeypatch, compress
):
  images, labels = _images(5, (28, 28)), np.array([9, 0, 3, 3, 1], np.uint8)
  _write_fashion(tmp_path, images, labels, compress=compress)
  by_argument = data.FashionMNIST('test', folder=tmp_path)
  monkeypatch.setenv('JAXLAB_FASHION_MNIST_DIR', str(tmp_path))
  by_environment = data.FashionMNIST('test')
  for source in (by_argument, by_environment):
    np.testing.assert_array_equal(source.arrays['image'][..., 0], images)
    np.testing.assert_array_equal(source.arrays['label'], labels)
  assert by_argument.class_names[9] == 'Ankle boot'


def test_fashion_mnist_that_is_nowhere_tells_how_to_get_it(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match='apt install dataset-fashion-mnist'):
    data.FashionMNIST(folder=tmp_path)
  monkeypatch.delenv('JAXLAB_FASHION_MNIST_DIR', raising=False)
  monkeypatch.setattr(embedded, 'FASHION_MNIST_DIR', str(tmp_path))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  command = 'tfds build fashion_mnist --file_format=array_record'
  with pytest.raises(FileNotFoundError, match=command) as error:
    data.FashionMNIST()
  assert 'apt install dataset-fashion-mnist' in str(error.value)


def test_truncated_idx_file_is_named(tmp_path):
  _write_fashion(tmp_path, _images(5, (28, 28)), np.zeros(5, np.uint8), compress=False)
  path = tmp_path / 't10k-images-idx3-ubyte'
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(ValueError, match='t10k-images-idx3-ubyte is not a complete idx file'):
    data.FashionMNIST('test', folder=tmp_path)


PREPARE = '''
import io, sys
import numpy as np, tensorflow_datasets as tfds
from PIL import Image

def png(i):
  file = io.BytesIO()
  Image.fromarray(np.full((4 + i, 5, 3), 20 * i, np.uint8)).save(file, 'PNG')
  file.seek(0)
  return file

class TinyColors(tfds.core.GeneratorBasedBuilder):
  """Seven pictures of one color."""
  VERSION = tfds.core.Version('1.0.0')
  def _info(self):
    features = {'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
                'label': (label := tfds.features.ClassLabel(names=['red', 'green', 'blue'])),
                'labels': tfds.features.Sequence(label), 'area': np.int64,
                'objects': tfds.features.Sequence({'label': label, 'area': np.int64})}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
  def _split_generators(self, manager):
    return {'train': ((i, self.example(i)) for i in range(7))}
  def example(self, i):
    objects = [{'label': c, 'area': 1} for c in range(i % 4)]  # in the first there is none
    return {'image': png(i), 'label': i % 3, 'labels': [0, 2, 2], 'area': i, 'objects': objects}
  def _generate_examples(self):
    pass

TinyColors(data_dir=sys.argv[1], file_format='array_record').download_and_prepare()
'''


@pytest.fixture(scope='module')
def catalogue_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  command = [sys.executable, '-c', PREPARE, str(folder)]
  (folder / 'prepare.py').write_text(PREPARE)
  command = [sys.executable, str(folder / 'prepare.py'), str(folder)]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  return folder


def test_catalogue_reads_array_records_without_tensorflow(catalogue_dir):
  source = data.Catalogue('tiny_colors', 'train', catalogue_dir)
  assert len(source) == 7 and source.class_names == ('red', 'green', 'blue')
  records = [source[i] for i in range(7)]
  # TFDS shuffles while it writes: the color tells which picture it is.
  for index, record in enumerate(records):
    color = int(record['image'][0, 0, 0]) // 20
    assert record['image'].shape == (4 + color, 5, 3) and record['label'] == color % 3
    assert record['index'] == index and record['label'].dtype == np.int32
  assert sorted(int(r['image'][0, 0, 0]) for r in records) == list(range(0, 140, 20))
  assert len(data.Catalogue('tiny_colors', 'train[:3]', catalogue_dir)) == 3
  again = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(again[4]['image'], records[4]['image'])
  encoded = data.Catalogue('tiny_colors', 'train', catalogue_dir, decode=False)
  np.testing.assert_array_equal(data.decode_image(encoded[2]['image']), records[2]['image'])
  assert 'tensorflow' not in sys.modules


def test_catalogue_lists_the_classes_of_an_image(catalogue_dir):
  objects = data.Catalogue('tiny_colors', 'train', catalogue_dir, labels='objects/label')
  assert objects.num_classes == 3 and objects.class_names == ('red', 'green', 'blue')
  for record in (objects[i] for i in range(7)):
    assert set(record) == {'image', 'multi_label', 'index'}
    count = int(record['image'][0, 0, 0]) // 20 % 4
    np.testing.assert_array_equal(record['multi_label'], np.arange(3) < count)
  listed = data.Catalogue('tiny_colors', 'train', catalogue_dir, labels='labels')
  np.testing.assert_array_equal(listed[0]['multi_label'], [1, 0, 1])
  for labels, message in (('objects/box', 'no feature .objects/box'), ('area', 'no class labels')):
    with pytest.raises(ValueError, match=message):
      data.Catalogue('tiny_colors', 'train', catalogue_dir, labels=labels)


def test_catalogue_tells_which_classes_are_known_of_an_image(catalogue_dir):
  options = {'labels': 'labels', 'unsure': 'objects/label'}
  source = data.Catalogue('tiny_colors', 'train[:3]+train[4:]', catalogue_dir, **options)
  assert len(source) == 6
  for record in (source[i] for i in range(6)):
    count = int(record['image'][0, 0, 0]) // 20 % 4
    np.testing.assert_array_equal(record['multi_label'], [1, 0, 1])
    # The second class is listed by objects alone, where there are two of them.
    np.testing.assert_array_equal(record['known'], [1, count < 2, 1])
  with pytest.raises(ValueError, match="unsure='labels' adds to labels"):
    data.Catalogue('tiny_colors', 'train', catalogue_dir, unsure='labels')
  with pytest.raises(ValueError, match='no class labels'):
    data.Catalogue('tiny_colors', 'train', catalogue_dir, labels='labels', unsure='area')


def test_catalogue_names_what_is_missing(catalogue_dir, tmp_path):
  command = f'tfds build cifar10 --file_format=array_record --data_dir={tmp_path}'
  with pytest.raises(FileNotFoundError, match=command):
    data.Catalogue('cifar10', 'train', tmp_path)
  with pytest.raises(ValueError, match="knows no data set 'cifar_ten'"):
    data.Catalogue('cifar_ten', 'train', tmp_path)
  with pytest.raises(ValueError, match="no feature 'box'"):
    data.Catalogue('tiny_colors', 'train', catalogue_dir, fields=['box'])
  with pytest.raises(ValueError, match="Unknown split 'tset'"):
    data.Catalogue('tiny_colors', 'tset', catalogue_dir)
  other_format = tmp_path / 'tiny_colors' / '1.0.0'
  other_format.mkdir(parents=True)
  for file in (catalogue_dir / 'tiny_colors' / '1.0.0').iterdir():
    content = file.read_bytes().replace(b'"array_record"', b'"tfrecord"')
    (other_format / file.name).write_bytes(content)
  with pytest.raises(FileNotFoundError, match='tfds build tiny_colors --file_format=array_record'):
    data.Catalogue('tiny_colors', 'train', tmp_path)


def test_image_folder_sorts_classes_and_files(tmp_path):
  for folder, names in {'b': ['2.png', '10.PNG'], 'a': ['x/y.png'], '.hidden': ['z.png']}.items():
    for name in names:
      path = tmp_path / folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(_images(1, (3, 5, 3))[0]).save(path)
  (tmp_path / 'b' / 'notes.txt').write_text('no image')
  source = data.ImageFolder(tmp_path)
  assert source.class_names == ('a', 'b') and len(source) == 3
  assert [int(source[i]['label']) for i in range(3)] == source.labels.tolist() == [0, 1, 1]
  np.testing.assert_array_equal(source[2]['image'], _images(1, (3, 5, 3))[0])
  encoded = data.ImageFolder(tmp_path, decode=False)[2]['image']
  assert Image.open(io.BytesIO(encoded)).size == (5, 3)


def test_image_folder_reports_empty_folders_and_broken_files(tmp_path):
  with pytest.raises(FileNotFoundError, match='is not a folder'):
    data.ImageFolder(tmp_path / 'nowhere')
  with pytest.raises(ValueError, match='has no subfolders'):
    data.ImageFolder(tmp_path)
  (tmp_path / 'cat').mkdir()
  with pytest.raises(ValueError, match='cat holds no images'):
    data.ImageFolder(tmp_path)
  (tmp_path / 'cat' / 'broken.jpg').write_bytes(b'not a picture')
  with pytest.raises(ValueError, match=r'broken\.jpg: cannot decode'):
    data.ImageFolder(tmp_path)[0]


def test_in_memory_rejects_bad_arrays():
  images = _images(3)
  with pytest.raises(ValueError, match='of one length'):
    data.InMemory({'image': images, 'label': np.zeros(2, int)})
  with pytest.raises(
    ValueError, match=r'2 labels are out of range 0\.\.3, the first at position 1'
  ):
    data.InMemory({'image': images, 'label': np.array([0, 4, -1])}, num_classes=4)
  with pytest.raises(ValueError, match=r'1 of 3 images hold NaN or infinity.* position 2'):
    floats = images.astype(np.float32)
    floats[2, 1] = np.nan
    data.InMemory({'image': floats, 'label': np.zeros(3, int)})
  with pytest.raises(ValueError, match='a last axis of 1'):
    data.InMemory({'image': images[..., 0], 'label': np.zeros(3, int)})
  with pytest.raises(ValueError, match='2 class_names for 3 classes'):
    data.InMemory({'label': np.zeros(3, int)}, 3, ('a', 'b'))


def test_materialized_source_equals_its_records():
  source = data.pasted(data.Digits('test', test_size=20), seed=1)
  arrays = data.materialize(source)
  memory = data.in_memory(source)
  assert set(arrays) == {'image', 'label', 'index'} and memory.class_names == source.class_names
  for i in (0, 7, 19):
    for name, value in source[i].items():
      np.testing.assert_array_equal(arrays[name][i], value)
      np.testing.assert_array_equal(memory[i][name], value)
  assert data.in_memory(memory) is memory


def test_records_of_different_shape_are_named():
  records = [{'image': _images(1, s)[0], 'index': i} for i, s in enumerate([(4, 4, 1), (5, 4, 1)])]
  with pytest.raises(
    ValueError, match=r"'image' differs in shape: \(4, 4, 1\) in record 0, \(5, 4"
  ):
    sources.stack_records(records)
  with pytest.raises(ValueError, match='different fields'):
    sources.stack_records([{'a': 1}, {'b': 1}])


@pytest.mark.parametrize(
  'labels, expected',
  [
    (np.array([1, 255], np.uint8), [1, 255]),
    (np.array([1.0, 2.0]), [1, 2]),
    ([0.9, 1.0], r'1 values of label are no integers of 32 bits, the first at position 0: 0\.9'),
    ([0.0, np.nan], 'position 1: nan'),
    (np.array([0, 2**31]), 'position 1: 2147483648'),
    (np.zeros((2, 1), int), r'shape \(2, 1\), expected \[records\]: take label\[:, 0\]'),
    (np.eye(2), r'take label\.argmax\(1\)'),
    (np.array(['a', 'b']), 'dtype <U1, expected integers'),
    (np.array([0, None], object), 'dtype object'),
    (np.array([True, False]), 'dtype bool'),
  ],
)
def test_labels_are_looked_at_before_they_are_cast(labels, expected):
  if isinstance(expected, list):
    assert data.as_labels(labels).tolist() == expected
    return
  with pytest.raises(ValueError, match=expected):
    data.InMemory({'image': _images(2), 'label': np.asarray(labels)})


def test_some_classes_are_numbered_anew_in_the_given_order():
  whole = data.Digits('test')
  some = data.class_subset(whole, (7, 2))
  assert some.num_classes == 2 and some.class_names == ('7', '2')
  labels = whole.arrays['label']
  rows = [i for i in range(len(whole)) if labels[i] in (7, 2)]
  np.testing.assert_array_equal(some.arrays['image'], whole.arrays['image'][rows])
  np.testing.assert_array_equal(some.arrays['label'], [(7, 2).index(labels[i]) for i in rows])
  np.testing.assert_array_equal(some.arrays['index'], np.arange(len(rows)))
  loaded = data.load('digits', 'test', classes=(7, 2))
  np.testing.assert_array_equal(loaded.arrays['image'], some.arrays['image'])
  pasted = data.load('pasted_digits', 'test', classes=(7, 2), pastes=3)
  np.testing.assert_array_equal(pasted.arrays['label'], np.repeat(some.arrays['label'], 3))


def test_some_classes_of_a_source_that_reads_its_records_when_asked():
  whole = data.Digits('test')

  class Lazy:
    num_classes, class_names = 10, whole.class_names

    def __len__(self):
      return len(whole)

    def __getitem__(self, index):
      return whole[index]

  lazy, expected = data.class_subset(Lazy(), (7, 2)), data.class_subset(whole, (7, 2))
  assert (len(lazy), lazy.num_classes, lazy.class_names) == (len(expected), 2, ('7', '2'))
  np.testing.assert_array_equal(data.source_labels(lazy), expected.arrays['label'])
  for index in (0, len(lazy) - 1):
    for name, value in expected[index].items():
      np.testing.assert_array_equal(lazy[index][name], value)
  none = data.class_subset(whole, (7, 2, 3))
  none = data.subset(none, np.flatnonzero(none.arrays['label'] == 0))
  with pytest.raises(ValueError, match=r'classes=\(1,\): no record'):
    data.class_subset(none, (1,))


@pytest.mark.parametrize('classes', [(), (1, 1), (3, 10), (-1, 2)])
def test_classes_that_cannot_be_are_named(classes):
  with pytest.raises(ValueError, match=r'classes=\('):
    data.class_subset(data.Digits('test'), classes)


def test_canvases_are_drawn_from_their_own_split_and_seed():
  train, test = (data.load('digit_canvases', split, length=20) for split in ('train', 'test'))
  assert isinstance(train, data.InMemory) and train.num_classes == 10
  assert train.arrays['image'].shape == (20, 36, 36, 1)
  assert set(train.arrays['multi_label'].sum(1)) <= {1, 2}
  for split, seed in (('train', 0), ('test', 1)):
    drawn = data.canvases(data.Digits(split), length=20, seed=seed)
    found = {'train': train, 'test': test}[split]
    np.testing.assert_array_equal(found.arrays['image'][7], drawn[7]['image'])
  other = data.load('digit_canvases', 'train', length=20, seed=1)
  assert (other.arrays['image'] != train.arrays['image']).any()


def test_training_images_are_pasted_as_often_as_asked():
  once, twice = (data.load('pasted_digits', 'train', pastes=n) for n in (1, 2))
  assert len(twice) == 2 * len(once)
  np.testing.assert_array_equal(twice.arrays['label'][::2], once.arrays['label'])
  assert np.any(twice.arrays['image'][::2] != twice.arrays['image'][1::2])
