"""Images with a value in place of a class: an age, an angle. Files by a list, and rotated digits.

Records hold `image`, `value` float32, `sigma` float32 (its deviation), `label`, the number of the nearest
entry of a grid of values, and `index`.
"""

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from jaxlab.data.sources.image_file import read_image
from jaxlab.data.sources.source import InMemory, Record


def read_values(path: str | os.PathLike) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
  """Reads a list of images with values, a line `relative/path value` or `relative/path value sigma` each.

  Returns:
    Paths, values and deviations, float32 `[records]`; deviations that are not there are NaN.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for an empty file, and a line of another form, with its number.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'there is no list {path}.')
  names, values, sigmas = [], [], []
  for number, line in enumerate(path.read_text(encoding='utf-8-sig').splitlines(), 1):
    if not line.strip():
      continue
    name, *numbers = line.split()
    try:
      value, sigma = (float(text) for text in (*numbers, *['nan'] * (len(numbers) == 1)))
    except ValueError:
      raise ValueError(f'{path}:{number} is {line!r}, expected `path value [sigma]`.') from None
    if not np.isfinite(value) or sigma < 0:
      raise ValueError(
        f'{path}:{number} has value {value} and sigma {sigma}: expected finite ones.'
      )
    names.append(name)
    values.append(value)
    sigmas.append(sigma)
  if not names:
    raise ValueError(f'{path} lists no images.')
  return tuple(names), np.array(values, np.float32), np.array(sigmas, np.float32)


class ValuedImages:
  """Image files with values by a list; read when asked for.

  Args:
    paths: lists, one after the other, see `read_values`.
    root: folder to which the listed paths are relative.
    grid: see `value_grid`; `label` is the nearest entry.
    sigma: deviation of images that the list has none of.
    decode: False leaves `image` as the file's bytes, for `DecodeImage`.

  Attributes:
    values: float32 `[records]`.
    labels: int32 `[records]`.

  Raises:
    FileNotFoundError: if a list or the first image is not there.
    ValueError: for a malformed list, values outside of the grid, and deviations that nobody says.
  """

  def __init__(
    self,
    paths: str | Sequence[str],
    root: str | os.PathLike,
    grid: tuple[float, float, float],
    sigma: float | None = None,
    decode: bool = True,
  ):
    paths = [paths] if isinstance(paths, str) else list(paths)
    parts = [read_values(path) for path in paths]
    self._names = [name for names, *_ in parts for name in names]
    self.values, sigmas = (np.concatenate([part[place] for part in parts]) for place in (1, 2))
    if sigma is None and np.isnan(sigmas).any():
      raise ValueError(
        f'{", ".join(paths)}: the first image without sigma is {self._first(sigmas)}.'
      )
    self._sigmas = np.where(np.isnan(sigmas), np.float32(sigma or 0), sigmas)
    grid = value_grid(*grid)
    outside = (self.values < grid[0]) | (self.values > grid[-1])
    if outside.any():
      place = int(np.argmax(outside))
      raise ValueError(
        f'{self._names[place]} has value {self.values[place]:g}, outside of {grid[0]:g} to {grid[-1]:g}.'
      )
    self.labels = nearest(self.values, grid)
    self.num_classes = len(grid)
    self.class_names = tuple(f'{value:g}' for value in grid)
    self._root, self._decode = pathlib.Path(root), decode
    if not (first := self._root / self._names[0]).is_file():
      raise FileNotFoundError(f'{first} is not there, the first image of {paths[0]}.')

  def _first(self, sigmas: np.ndarray) -> str:
    return self._names[int(np.argmax(np.isnan(sigmas)))]

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> Record:
    return {
      'image': read_image(self._root / self._names[index], self._decode),
      'value': self.values[index],
      'sigma': self._sigmas[index],
      'label': self.labels[index],
      'index': np.int32(index),
    }


def rotated_digits(
  split: str,
  grid: tuple[float, float, float],
  length: int = 1500,
  side: int = 16,
  limit: float = 45.0,
  noise: float = 3.0,
  seed: int = 0,
) -> InMemory:
  """Returns digits that are turned by a random angle, which is their value, in degrees.

  Digits are enlarged and turned (both bilinear, zeros outside). Values of training images have noise, as
  those of annotators; those of test images are the true angles. Training and test images show different
  digits.

  Args:
    split: 'train' or 'test'.
    grid: see `value_grid`; `label` is the nearest entry, and training values are clipped to its ends.
    length: number of images.
    side: of the images.
    limit: largest angle to either side.
    noise: standard deviation, `sigma` of every record.
    seed: of digits, angles and noise.
  """
  from scipy import ndimage
  from sklearn.datasets import load_digits

  if split not in ('train', 'test'):
    raise ValueError(f"split is {split!r}, expected 'train' or 'test'.")
  images = load_digits().images * (255 / 16)
  order = np.random.default_rng(0).permutation(len(images))
  half = len(order) // 2
  pool = order[:half] if split == 'train' else order[half:]
  rng = np.random.default_rng([seed, split == 'test'])
  chosen, angles = rng.choice(pool, length), rng.uniform(-limit, limit, length)
  drawn = rng.normal(size=length) * noise
  turned = np.zeros((length, side, side, 1), np.uint8)
  for place, (index, angle) in enumerate(zip(chosen, angles, strict=True)):
    large = ndimage.zoom(images[index], side / 8, order=1, mode='nearest', grid_mode=True)
    image = ndimage.rotate(large, angle, reshape=False, order=1)
    turned[place, ..., 0] = np.round(np.clip(image, 0, 255))
  grid = value_grid(*grid)
  values = np.clip(angles + drawn, grid[0], grid[-1]) if split == 'train' else angles
  values = values.astype(np.float32)
  arrays = {'image': turned, 'value': values, 'sigma': np.full(length, noise, np.float32)}
  names = [f'{value:g}' for value in grid]
  return InMemory({**arrays, 'label': nearest(values, grid)}, len(grid), names)


def value_grid(low: float, high: float, step: float = 1.0) -> np.ndarray:
  """Returns the values from `low` to `high`, both included, `step` apart, float64.

  Raises:
    ValueError: if `step` is not positive, or does not lead from one end to the other.

  >>> value_grid(1, 2, 0.5).tolist()
  [1.0, 1.5, 2.0]
  """
  count = round((high - low) / step) if step > 0 else 0
  if count < 1 or abs(low + count * step - high) > 1e-6 * abs(step):
    raise ValueError(
      f'low={low}, high={high}, step={step}: expected steps from one end to the other.'
    )
  return low + (high - low) * np.arange(count + 1) / count


def nearest(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
  """Returns the number of the entry of an increasing grid that is nearest to each value; of two the lower.

  >>> nearest(np.array([0.2, 0.5, 3.0]), np.arange(3.0)).tolist()
  [0, 0, 2]
  """
  middles = (grid[1:] + grid[:-1]) / 2
  return np.searchsorted(middles, values).astype(np.int32)
