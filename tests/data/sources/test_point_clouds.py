import numpy as np
import pytest

from jaxlab import data


@pytest.fixture
def root(tmp_path):
  """Returns a folder of three clouds of two classes."""
  rng = np.random.default_rng(0)
  for name in ('chair_0001', 'night_stand_0001', 'night_stand_0002'):
    folder = tmp_path / name.rpartition('_')[0]
    folder.mkdir(exist_ok=True)
    np.savetxt(folder / f'{name}.txt', rng.normal(size=(6, 6)) + 5, delimiter=',')
  (tmp_path / 'modelnet40_shape_names.txt').write_text('chair\nnight_stand\n')
  (tmp_path / 'modelnet40_train.txt').write_text('night_stand_0002\nchair_0001\n')
  (tmp_path / 'modelnet40_test.txt').write_text('night_stand_0001\n')
  return tmp_path


def test_clouds_are_the_first_points_in_the_unit_sphere(root):
  source = data.load('point_clouds', 'train', root=root, num_points=4)
  assert len(source) == 2 and source.labels.tolist() == [1, 0]
  record = source[0]
  points = np.loadtxt(root / 'night_stand' / 'night_stand_0002.txt', delimiter=',')[:4, :3]
  points -= points.mean(0)
  expected = points / np.linalg.norm(points, axis=1).max()
  np.testing.assert_allclose(record['features'], expected, atol=1e-6)
  assert record['label'] == 1 and record['features'].dtype == np.float32


def test_what_is_missing_is_named(root):
  with pytest.raises(ValueError, match='holds 6 points, expected 9'):
    data.PointClouds('test', root, num_points=9)[0]
  with pytest.raises(FileNotFoundError, match='no list'):
    data.PointClouds('val', root)
  (root / 'modelnet40_val.txt').write_text('sofa_0001\n')
  with pytest.raises(ValueError, match="lists 'sofa', which is no class"):
    data.PointClouds('val', root)
  (root / 'modelnet40_val.txt').write_text('chair_0009\n')
  with pytest.raises(FileNotFoundError, match='is not there, a cloud'):
    data.PointClouds('val', root)


def test_points_of_a_digit_lie_on_its_ink():
  source = data.load('digit_points', 'test', num_points=500)
  digits = data.load('digits', 'test')
  np.testing.assert_array_equal(source.arrays['label'], digits.arrays['label'])
  points = source.arrays['features']
  assert points.shape == (500, 500, 3) and not points[..., 2].any()
  np.testing.assert_allclose(np.linalg.norm(points, axis=-1).max(1), 1, rtol=1e-5)
  # The points' spread is that of the ink, but for the size.
  ink = digits.arrays['image'][..., 0].astype(float)
  columns = (ink.sum(1) * np.arange(8)).sum(1) / ink.sum((1, 2))
  rows = (ink.sum(2) * np.arange(8)).sum(1) / ink.sum((1, 2))
  wide = (ink.sum(1) * (np.arange(8) - columns[:, None]) ** 2).sum(1) / ink.sum((1, 2))
  high = (ink.sum(2) * (np.arange(8) - rows[:, None]) ** 2).sum(1) / ink.sum((1, 2))
  own = points[..., 0].var(1) / points[..., 1].var(1)
  assert np.corrcoef(np.log(own), np.log(wide / high))[0, 1] > 0.95


def test_one_place_stays_finite():
  np.testing.assert_array_equal(data.unit_sphere(np.ones((2, 3, 3))), np.zeros((2, 3, 3)))
