"""A small data set made six times as large."""

from collections.abc import Callable

import numpy as np

from jaxlab.data.sources.source import Record, Source
from jaxlab.data.transforms.expansion import cut_out_share, rotate_degrees, shuffle_tiles

VARIANTS = ('original', 'tiles_2', 'tiles_3', 'tiles_4', 'cut_out', 'rotated')


class Expanded:
  """A source with five changed copies behind the images of another one, made when they are asked for.

  In this order, each for all images: as they are; cut into 2x2, 3x3 and 4x4 tiles in random order; with a
  rectangle of zeros (`cut_out_share`); turned by a uniform whole number of degrees in [0, 360]. All keep the
  label. A copy is the same whenever it is read: its generator is seeded by `seed` and its number.

  Records hold `image`, `label`, `index` and `origin`, the number of the image that it was.

  Args:
    source: of uint8 images.
    seed: of the changes.
    transform: of a record of the source before, such as `DecodeImage`.

  Attributes:
    factor: times as many records.

  References:
    Luo & Wu, CVPR 2020 (https://arxiv.org/abs/1911.08114), data expansion, by its code.
  """

  factor = len(VARIANTS)

  def __init__(
    self, source: Source, seed: int, transform: Callable[[Record], Record] | None = None
  ):
    self._source, self._seed, self._transform = source, seed, transform
    self.num_classes, self.class_names = source.num_classes, source.class_names

  def __len__(self) -> int:
    return len(self._source) * self.factor

  def __getitem__(self, index: int) -> Record:
    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}.')
    variant, origin = divmod(index, len(self._source))
    record = self._source[origin]
    record = self._transform(record) if self._transform else record
    image = changed(VARIANTS[variant], record['image'], np.random.default_rng((self._seed, index)))
    numbers = {'index': np.int32(index), 'origin': np.int32(origin)}
    return {'image': image, 'label': record['label'], **numbers}


def changed(variant: str, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns a variant, of `VARIANTS`, of an image."""
  if variant == 'original':
    return image
  if variant == 'cut_out':
    return cut_out_share(rng, image)
  if variant == 'rotated':
    return rotate_degrees(image, int(rng.integers(361)))
  return shuffle_tiles(rng, image, int(variant.removeprefix('tiles_')))
