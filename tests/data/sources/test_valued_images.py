import numpy as np
import pytest
from PIL import Image

from jaxlab import data

GRID = (0.0, 10.0, 1.0)


@pytest.fixture
def root(tmp_path):
  for name, level in (('a.png', 10), ('b.png', 200)):
    Image.fromarray(np.full((6, 5, 3), level, np.uint8)).save(tmp_path / name)
  (tmp_path / 'train.txt').write_text('a.png 3.6 0.5\n\nb.png 9 0\n')
  (tmp_path / 'more.txt').write_text('b.png 10\n')
  return tmp_path


def test_files_of_several_lists_have_their_values(root):
  paths = (str(root / 'train.txt'), str(root / 'more.txt'))
  source = data.load('valued_images', paths=paths, root=root, grid=GRID, sigma=2.0)
  assert len(source) == 3 and source.num_classes == 11
  np.testing.assert_array_equal(source.labels, [4, 9, 10])
  record = source[2]
  assert (record['value'], record['sigma'], record['index']) == (10, 2, 2)
  assert record['image'].shape == (6, 5, 3) and record['image'].max() == 200
  np.testing.assert_allclose([source[i]['sigma'] for i in range(2)], [0.5, 0])


@pytest.mark.parametrize(
  ('text', 'options', 'message'),
  [
    ('a.png\n', {}, "train.txt:1 is 'a.png', expected `path value"),
    ('a.png 3 1\nb.png x 1\n', {}, r'train.txt:2'),
    ('a.png nan 1\n', {}, 'expected finite ones'),
    ('a.png 3 -1\n', {}, 'sigma -1.0'),
    ('', {}, 'lists no images'),
    ('a.png 3\n', {}, 'the first image without sigma is a.png'),
    ('a.png 3 1\nb.png 11 1\n', {}, 'b.png has value 11, outside of 0 to 10'),
    ('a.png 3 1\n', {'grid': (0.0, 1.0, 0.3)}, 'steps from one end to the other'),
    ('a.png 3 1\n', {'grid': (0.0, 1.0, 0.0)}, 'step=0'),
  ],
)
def test_malformed_lists_are_named(text, options, message, root):
  (root / 'train.txt').write_text(text)
  with pytest.raises(ValueError, match=message):
    data.ValuedImages(str(root / 'train.txt'), root, **{'grid': GRID, **options})


def test_missing_files_are_named(root):
  with pytest.raises(FileNotFoundError, match='no list'):
    data.ValuedImages(str(root / 'val.txt'), root, GRID)
  with pytest.raises(FileNotFoundError, match='the first image of'):
    data.ValuedImages(str(root / 'train.txt'), root / 'images', GRID)


def test_a_digit_is_turned_by_its_value():
  options = {'grid': (-50.0, 50.0, 1.0), 'length': 60}
  train, test = (data.load('rotated_digits', split, **options) for split in ('train', 'test'))
  still = data.rotated_digits('test', limit=0.0, **options).arrays['image'].astype(float)
  from scipy import ndimage

  for index in range(5):
    record = test[index]
    turned = ndimage.rotate(still[index, ..., 0], record['value'], reshape=False, order=1)
    assert np.abs(turned - record['image'][..., 0]).max() <= 1
    assert record['label'] == np.abs(data.value_grid(*options['grid']) - record['value']).argmin()
  # Training values are of annotators with a deviation of 3 degrees, test values are exact.
  exact = data.rotated_digits('train', noise=0.0, **options)
  error = train.arrays['value'] - exact.arrays['value']
  np.testing.assert_array_equal(train.arrays['image'], exact.arrays['image'])
  assert 2 < error.std() < 4 and np.abs(train.arrays['value']).max() <= 50
  assert (test.arrays['sigma'] == 3).all() and np.abs(test.arrays['value']).max() <= 45
  with pytest.raises(ValueError, match="split is 'val'"):
    data.load('rotated_digits', 'val', **options)
