import numpy as np
import pytest
from PIL import Image

from jaxlab import data
from jaxlab.data.sources import photographs


@pytest.fixture
def root(tmp_path):
  """Two training photographs, one red and one blue, and a green one for tests."""
  colors = {
    'train/red.png': (255, 0, 0),
    'train/blue.jpg': (0, 0, 255),
    'test/green.png': (0, 255, 0),
  }
  for name, color in colors.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new('RGB', (60, 40), color).save(tmp_path / name, quality=100)
  (tmp_path / 'train' / '._red.png').write_bytes(b'none')  # what another system leaves beside files
  return tmp_path


def test_crops_are_of_their_split_and_depend_on_seed_and_index_alone(root):
  source = data.load('photographs', 'train', root=root, count=30, size=16, seed=3)
  again = data.Photographs('train', root=root, count=40, size=16, seed=3)
  assert len(source) == 30 and source.num_classes == 1
  seen = []
  for index in (29, 0, 7):
    record = source[index]
    np.testing.assert_array_equal(record['image'], again[index]['image'])
    assert record['image'].shape == (16, 16, 3) and record['image'].dtype == np.uint8
    assert record['label'] == 0 and record['index'] == index
  seen = {int(source[i]['image'].mean((0, 1)).argmax()) for i in range(30)}
  assert seen == {0, 2}  # red and blue
  test = data.Photographs('test', root=root, count=5, size=16)
  assert all(test[i]['image'].mean((0, 1)).argmax() == 1 for i in range(5))


def test_a_crop_is_a_square_part_in_its_proportions(tmp_path):
  """On a ramp, the values of a crop rise evenly, by as much along the rows as along the columns."""
  (tmp_path / 'train').mkdir()
  y, x = np.mgrid[:100, :200]
  ramp = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)
  Image.fromarray(ramp).save(tmp_path / 'train' / 'ramp.png')
  source = data.Photographs('train', root=tmp_path, count=20, size=50, scale=(0.25, 1.0))
  sides = []
  for index in range(20):
    image = source[index]['image'].astype(float)
    across, down = abs(np.diff(image[..., 0], axis=1)), np.diff(image[..., 1], axis=0)
    assert abs(across.mean() - down.mean()) < 0.05
    sides.append(down.mean() * 50)
  assert min(sides) > 48 and max(sides) < 101 and max(sides) - min(sides) > 15


@pytest.mark.parametrize(
  'options, error, message',
  [
    ({'split': 'valid'}, ValueError, "split is 'valid'"),
    ({'count': 0}, ValueError, 'count=0'),
    ({'scale': (0.5, 0.2)}, ValueError, r'scale=\(0.5, 0.2\)'),
    ({'root': 'nowhere'}, FileNotFoundError, 'nowhere/train holds no photographs'),
  ],
)
def test_what_cannot_be_is_refused(options, error, message):
  with pytest.raises(error, match=message):
    data.Photographs(**{'count': 3, **options})


def test_missing_packages_are_named(monkeypatch):
  monkeypatch.setitem(photographs.SHIPPED, 'train', ('no_such_package/data/cat.png',))
  with pytest.raises(FileNotFoundError, match=r'no_such_package/data/cat\.png.*pip install'):
    data.Photographs('train', count=2)


def test_a_damaged_photograph_is_named(root):
  (root / 'test' / 'green.png').write_bytes(b'no image')
  with pytest.raises(ValueError, match=r'green\.png'):
    data.Photographs('test', root=root, count=1)[0]
