"""Clouds of points with a label: ModelNet's text files, and the ink of the embedded digits."""

import os
import pathlib

import numpy as np

from jaxlab.data.sources.embedded import Digits
from jaxlab.data.sources.source import InMemory, Record


def unit_sphere(points: np.ndarray) -> np.ndarray:
  """Returns points `[..., points, 3]` around their mean, the furthest at distance 1; a single place is 0.

  >>> unit_sphere(np.array([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]))[:, 0].tolist()
  [-1.0, 1.0]
  """
  centered = points - points.mean(-2, keepdims=True)
  radius = np.sqrt((centered**2).sum(-1, keepdims=True)).max(-2, keepdims=True)
  return centered / np.where(radius > 0, radius, 1)


class PointClouds:
  """Text files of points, as ModelNet40 is published resampled (`modelnet40_normal_resampled`).

  `ROOT/NAME_train.txt` and `ROOT/NAME_test.txt` list the clouds (`airplane_0001`),
  `ROOT/NAME_shape_names.txt` the classes; `ROOT/airplane/airplane_0001.txt` has a line `x,y,z,...` for each
  point. Read when asked for; records hold `features` float32 `[num_points, 3]`, `label` and `index`.

  Args:
    split: 'train' or 'test'.
    root: the folder.
    name: of the lists.
    num_points: of each cloud, the first ones.

  Raises:
    FileNotFoundError: if lists or the first cloud are not there.
    ValueError: for a list with another class than those named.
  """

  def __init__(
    self, split: str, root: str | os.PathLike, name: str = 'modelnet40', num_points: int = 1024
  ):
    self._root, self.num_points = pathlib.Path(root), num_points
    self.class_names = tuple(self._lines(f'{name}_shape_names.txt'))
    self.num_classes = len(self.class_names)
    self._names = self._lines(f'{name}_{split}.txt')
    folders = [item.rpartition('_')[0] for item in self._names]
    if unknown := sorted(set(folders) - set(self.class_names)):
      raise ValueError(f'{self._root}/{name}_{split}.txt lists {unknown[0]!r}, which is no class.')
    self.labels = np.array([self.class_names.index(folder) for folder in folders], np.int32)
    self._path(0)

  def _lines(self, name: str) -> list[str]:
    path = self._root / name
    if not path.is_file():
      raise FileNotFoundError(f'there is no list {path}; it comes with the clouds.')
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines:
      raise ValueError(f'{path} is empty.')
    return lines

  def _path(self, index: int) -> pathlib.Path:
    path = self._root / self.class_names[self.labels[index]] / f'{self._names[index]}.txt'
    if not path.is_file():
      raise FileNotFoundError(f'{path} is not there, a cloud of the list.')
    return path

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> Record:
    path = self._path(index)
    points = np.loadtxt(path, delimiter=',', max_rows=self.num_points, usecols=(0, 1, 2), ndmin=2)
    if len(points) < self.num_points or not np.all(np.isfinite(points)):
      raise ValueError(
        f'{path} holds {len(points)} points, expected {self.num_points} finite ones.'
      )
    own = unit_sphere(points).astype(np.float32)
    return {'features': own, 'label': self.labels[index], 'index': np.int32(index)}


def digit_points(split: str, num_points: int = 64, seed: int = 0) -> InMemory:
  """Returns the digits as clouds of points in a plane: pixels drawn in proportion to their ink.

  Each point lies at a random place of its pixel; the third coordinate is 0. Records as `PointClouds`.

  Args:
    split: see `Digits`.
    num_points: of each cloud.
    seed: of the points.
  """
  digits = Digits(split).arrays
  rng = np.random.default_rng([seed, split == 'test'])
  ink = digits['image'].reshape(len(digits['image']), -1).astype(np.float64)
  shares = np.cumsum(ink / ink.sum(1, keepdims=True), 1)
  drawn = rng.random((len(ink), num_points))
  pixels = np.minimum((drawn[:, :, None] > shares[:, None]).sum(2), ink.shape[1] - 1)
  side = digits['image'].shape[1]
  places = np.stack([pixels % side, -(pixels // side), np.zeros_like(pixels)], -1)
  places = places + rng.uniform(-0.5, 0.5, places.shape) * [1, 1, 0]
  features = unit_sphere(places).astype(np.float32)
  return InMemory({'features': features, 'label': digits['label']}, 10)
