"""Random crops of a few photographs: images of the real world where there is no data set."""

import functools
import importlib.util
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlab.data.sources.image_file import EXTENSIONS, image_files, read_image
from jaxlab.data.sources.source import Record

# Photographs that two packages ship, and how they are split: what the test crops show, training crops do not.
SHIPPED = {
  'train': (
    'sklearn/datasets/images/flower.jpg', 'skimage/data/astronaut.png', 'skimage/data/coffee.png',
    'skimage/data/hubble_deep_field.jpg', 'skimage/data/motorcycle_left.png', 'skimage/data/ihc.png',
  ),
  'test': (
    'sklearn/datasets/images/china.jpg', 'skimage/data/chelsea.png', 'skimage/data/rocket.jpg',
    'skimage/data/retina.jpg',
  ),
}  # fmt: skip


class Photographs:
  """Random crops of photographs, without labels: records `image` uint8 `[size, size, 3]`, `label` 0, `index`.

  Crop i is drawn from the seed and i alone: a photograph, then a part of it of a random area and the aspect
  ratio 1 (all of its height or width at most), a flip with probability 0.5, resized with antialiasing.

  Args:
    split: 'train' or 'test'.
    count: number of crops.
    size: side of a crop in pixels.
    scale: lowest and highest share of the photograph's largest square.
    root: a folder with image files in `train/` and `test/`; None: those that scikit-learn and scikit-image
      ship (`SHIPPED`).
    seed: of the crops.

  Attributes:
    files: the photographs.
    num_classes: 1; `label` says nothing.

  Raises:
    ValueError: for an unknown split or an option out of range.
    FileNotFoundError: if a package or folder, or the photographs in it are missing; says what to do.
  """

  def __init__(
    self,
    split: str = 'train',
    *,
    count: int = 2048,
    size: int = 224,
    scale: tuple[float, float] = (0.1, 1.0),
    root: str | os.PathLike | None = None,
    seed: int = 0,
  ):
    if split not in SHIPPED:
      raise ValueError(f'split is {split!r}, expected one of {list(SHIPPED)}.')
    if count < 1 or size < 1 or not 0 < scale[0] <= scale[1] <= 1:
      raise ValueError(
        f'count={count} and size={size} must be positive, scale={scale} two rising shares in (0, 1].'
      )
    self.files = _shipped(split) if root is None else _in_folder(pathlib.Path(root) / split)
    self.num_classes, self.class_names = 1, ('photograph',)
    self._count, self._size, self._scale = count, size, scale
    self._seed = (seed, split == 'test')

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> Record:
    from PIL import Image

    if not 0 <= index < self._count:
      raise IndexError(f'record {index} of {self._count}.')
    rng = np.random.default_rng((*self._seed, index))
    photograph = _read(self.files[rng.integers(len(self.files))])
    width, height = photograph.size
    side = min(width, height) * float(rng.uniform(*self._scale)) ** 0.5
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    crop = photograph.resize(
      (self._size, self._size),
      Image.Resampling.BILINEAR,
      box=(left, top, left + side, top + side),
    )
    pixels = np.asarray(crop)
    pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
    return {
      'image': np.ascontiguousarray(pixels),
      'label': np.int32(0),
      'index': np.int32(index),
    }


def _shipped(split: str) -> Sequence[pathlib.Path]:
  found = []
  for name in SHIPPED[split]:
    package, _, rest = name.partition('/')
    spec = importlib.util.find_spec(package)
    path = spec and pathlib.Path(spec.submodule_search_locations[0]) / rest
    if not path or not path.is_file():
      raise FileNotFoundError(
        f'{name} is not there: these photographs come with scikit-learn and scikit-image (pip install '
        'scikit-image); or give root, a folder with photographs of your own in train/ and test/.'
      )
    found.append(path)
  return found


def _in_folder(folder: pathlib.Path) -> Sequence[pathlib.Path]:
  found = image_files(folder)
  if not found:
    raise FileNotFoundError(f'{folder} holds no photographs ({", ".join(sorted(EXTENSIONS))}).')
  return found


@functools.lru_cache(maxsize=32)
def _read(path: pathlib.Path) -> Any:
  """Returns the photograph as a PIL image."""
  from PIL import Image

  return Image.fromarray(read_image(path, decode=True))
