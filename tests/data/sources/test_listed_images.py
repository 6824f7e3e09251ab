import pickle

import numpy as np
import pytest

from jaxlab import data
from jaxlab.data.sources.listed_images import ListedImages, read_split_file
from jaxlab.data.sources.source import source_labels
from jaxlab.data.sources.subset import subset


@pytest.fixture
def listing(tmp_path):
  from PIL import Image

  names = ['train/a b/0.png', 'train/c/1.png', 'train/c/2.png']
  for value, name in enumerate(names):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), 10 * value, np.uint8)).save(tmp_path / name)
  path = tmp_path / 'Set_LT_train.txt'
  path.write_text('\n'.join(f'{name} {label}' for name, label in zip(names, (0, 2, 1))) + '\n\n')
  return path


def test_split_file_gives_paths_and_labels_in_its_order(listing):
  names, labels = read_split_file(listing)
  assert names == ('train/a b/0.png', 'train/c/1.png', 'train/c/2.png')
  assert labels.tolist() == [0, 2, 1] and labels.dtype == np.int32


def test_listed_images_are_read_when_asked_for(listing):
  source = ListedImages(listing, listing.parent)
  (listing.parent / 'train/c/1.png').unlink()
  assert len(source) == source.num_classes == 3
  np.testing.assert_array_equal(source_labels(source), [0, 2, 1])
  view = subset(source, np.array([2, 0]))
  batch = next(iter(data.epoch_batches(view, 2)))
  assert batch['image'][:, 0, 0, 0].tolist() == [20, 0]
  assert batch['label'].tolist() == [1, 0] and batch['index'].tolist() == [0, 1]
  np.testing.assert_array_equal(source_labels(view), [1, 0])
  with pytest.raises(FileNotFoundError, match=r'1\.png'):
    source[1]


def test_encoded_bytes_are_left_for_the_decoder(listing):
  record = ListedImages(listing, listing.parent, decode=False)[2]
  assert record['image'] == (listing.parent / 'train/c/2.png').read_bytes()


def test_bad_lists_are_named(listing):
  folder = listing.parent
  with pytest.raises(FileNotFoundError, match=r'no split file .*missing\.txt'):
    read_split_file(folder / 'missing.txt')
  with pytest.raises(FileNotFoundError, match='root must be the folder'):
    ListedImages(listing, folder / 'train')
  with pytest.raises(ValueError, match=r'1 labels are out of range 0\.\.1'):
    ListedImages(listing, folder, num_classes=2)
  with pytest.raises(ValueError, match='2 class_names for 3 classes'):
    ListedImages(listing, folder, num_classes=3, class_names=('a', 'b'))
  (folder / 'train/a b/0.png').write_bytes(b'no image')
  with pytest.raises(ValueError, match=r'0\.png'):
    ListedImages(listing, folder)[0]
  for text, message in (
    ('', 'lists no images'),
    ('a.png 0\nb.png\n', r":2 is 'b\.png', expected"),
    ('a.png -1\n', ':1 is'),
    ('3\n', ':1 is'),
  ):
    (folder / 'bad.txt').write_text(text)
    with pytest.raises(ValueError, match=message):
      read_split_file(folder / 'bad.txt')


def test_lists_in_other_encodings_are_read_or_named_with_their_line(tmp_path):
  path = tmp_path / 'list.txt'
  path.write_bytes(b'\xef\xbb\xbfa.png 0\nb.png 1\n')
  assert read_split_file(path)[0] == ('a.png', 'b.png')
  for content, message in (
    ('a.png 0\n'.encode('utf-16'), 'list.txt:1 is UTF-16'),
    ('a.png 0\nüb.png 1\n'.encode('latin-1'), r'list.txt:2 is .* no UTF-8'),
    (b'a.png 0\nb.png 2147483648\n', 'list.txt:2 has label 2147483648'),
  ):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
      read_split_file(path)


def test_a_damaged_file_is_named_by_its_path_also_in_a_subset_and_in_worker_processes(listing):
  (listing.parent / 'train/c/2.png').write_bytes(b'no image')
  view = subset(ListedImages(listing, listing.parent, decode=False), np.array([2, 0]))
  assert pickle.loads(pickle.dumps(view[0]['image'])).origin.endswith('2.png')
  with pytest.raises(ValueError, match=r'train/c/2\.png: cannot decode') as error:
    data.DecodeImage(4)(view[0])
  assert 'record' not in str(error.value)
