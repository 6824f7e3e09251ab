"""Parts of images as images of their own."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxlab.data.sources.source import Record, Source


class Crops:
  """A source of what lies in some boxes of the images of another one, cut out when it is asked for.

  Records hold `image` uint8 `[size, size, channels]` (PIL, bilinear), the `label` of the whole image,
  `index`, and `origin`, the number of that image.

  Args:
    source: of uint8 images.
    boxes: of every image, integers `[boxes, 4]`, (x0, y0, x1, y1), half open.
    size: side of the crops.
    transform: of a record of the source before it is cut, such as `DecodeImage`.

  Raises:
    ValueError: for boxes of another number of images, or none at all; when such a crop is asked for, for a
      box without an area or beyond its image.
  """

  def __init__(
    self,
    source: Source,
    boxes: Sequence[np.ndarray],
    size: int,
    transform: Callable[[Record], Record] | None = None,
  ):
    if len(boxes) != len(source):
      raise ValueError(f'boxes of {len(boxes)} images for a source of {len(source)}.')
    if size < 1:
      raise ValueError(f'size={size}: expected a positive number of pixels.')
    own = [np.reshape(each, (-1, 4)) for each in boxes]
    self._boxes = np.concatenate(own)
    self._origins = np.repeat(np.arange(len(own)), [len(each) for each in own])
    if not len(self._boxes):
      raise ValueError('there is no box in any image.')
    self._source, self._size, self._transform = source, size, transform
    self.num_classes, self.class_names = source.num_classes, source.class_names

  def __len__(self) -> int:
    return len(self._boxes)

  def __getitem__(self, index: int) -> Record:
    from PIL import Image

    origin, box = int(self._origins[index]), self._boxes[index]
    record = self._source[origin]
    record = self._transform(record) if self._transform else record
    x0, y0, x1, y1 = (int(edge) for edge in box)
    image = record['image']
    height, width, channels = image.shape
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
      raise ValueError(
        f'crop {index} of image {origin}: box {box.tolist()} is not within its {height}x{width} pixels.'
      )
    part = Image.fromarray(image[y0:y1, x0:x1, 0] if channels == 1 else image[y0:y1, x0:x1])
    part = part.resize((self._size,) * 2, Image.Resampling.BILINEAR)
    pixels = np.asarray(part).reshape(self._size, self._size, channels)
    return {
      'image': pixels,
      'label': record['label'],
      'index': np.int32(index),
      'origin': np.int32(origin),
    }
