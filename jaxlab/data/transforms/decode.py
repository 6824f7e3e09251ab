"""Host-side decoding and resizing of encoded images, as transforms of records."""

import dataclasses
import io
import math
from typing import Any

import numpy as np

from jaxlab.data.sources.source import Record


def decode_image(data: bytes, draft: int | None = None) -> np.ndarray:
  """Returns an encoded image (JPEG, PNG, ...) as uint8 RGB `[height, width, 3]`.

  Args:
    data: the file's bytes. Gray and palette images become RGB; EXIF orientation is ignored, as
      torchvision does. Gray levels of 16 bits are scaled to 8, `round(v / 257)`.
    draft: let the JPEG decoder shrink by 2, 4 or 8 while both sides stay at least this long: several
      times faster on large photographs, and slightly different pixels.

  Raises:
    ValueError: if the bytes are no complete image, one of PIL's decompression bombs, or one whose pixels
      have no known range (32-bit integers, floats); it names the file, where the bytes know theirs.
  """
  return np.array(_open(data, draft))


@dataclasses.dataclass(frozen=True)
class DecodeImage:
  """Record transform: decodes `image`, resizes its shorter side, cuts out the center.

  The evaluation rule of ImageNet: shorter side to `resize` (with antialias, through PIL: along the rows,
  then along the columns, rounded to a byte after each), then the central `size` x `size` pixels. It gives
  every record one shape, from which random crops are made on the device. A plain callable, as grain's
  `map` and `make_loader(transform=...)` take.

  What the cut drops is not resized where that leaves every pixel the same: along sides whose resized
  length, divided by its greatest common divisor with the length before, is a power of two (375 to 256).

  Attributes:
    size: side of the result in pixels.
    resize: length of the shorter side before the cut; default: `size` (nothing but the longer side's
      ends are lost). 256 with size 224 is the usual evaluation.
    interpolation: 'bilinear' or 'bicubic'.
    draft: faster, and slightly different pixels: JPEGs may be decoded at reduced size when they are much
      larger (see `decode_image`), and what the cut drops is never resized, which moves few pixels by
      a gray level.
    stretch: resize both sides to `resize` (default: `size`), whatever the aspect was, before the cut.
  """

  size: int
  resize: int | None = None
  draft: bool = False
  interpolation: str = 'bilinear'
  stretch: bool = False

  def __post_init__(self):
    if self.interpolation not in ('bilinear', 'bicubic'):
      raise ValueError(
        f"interpolation is {self.interpolation!r}, expected one of 'bilinear', 'bicubic'."
      )
    if self.size < 1:
      raise ValueError(f'size is {self.size}, expected a positive number of pixels.')
    if self.resize is not None and self.resize < self.size:
      raise ValueError(
        f'the crop of size {self.size} is larger than the resized image of side {self.resize}; '
        'choose resize >= size.'
      )

  def __call__(self, record: Record) -> Record:
    """Returns the record with `image` uint8 `[size, size, channels]`; from bytes or uint8 HWC."""
    try:
      image = self._convert(record['image'])
    except ValueError as error:
      if hasattr(record['image'], 'origin'):  # the file is named already
        raise
      raise ValueError(f'record {record.get("index")}: {error}') from error
    return {**record, 'image': image}

  def _convert(self, image: Any) -> np.ndarray:
    from PIL import Image

    shorter = self.resize or self.size
    if isinstance(image, bytes):
      picture = _open(image, shorter if self.draft else None)
    else:
      if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(f'image is {image.dtype}{image.shape}, expected bytes or uint8 HWC.')
      picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if self.stretch:
      resized = picture.resize((shorter,) * 2, Image.Resampling[self.interpolation.upper()])
      inside = slice((shorter - self.size) // 2, (shorter - self.size) // 2 + self.size)
      return np.array(resized).reshape(shorter, shorter, -1)[inside, inside]
    width, height = picture.size
    # The longer side is truncated, as torchvision does.
    if width <= height:
      width, height = shorter, int(shorter * height / width)
    else:
      width, height = int(shorter * width / height), shorter
    x, columns, left = self._span(picture.size[0], width)
    y, rows, top = self._span(picture.size[1], height)
    kind = Image.Resampling[self.interpolation.upper()]
    # The rows that the vertical filter reads, and one to spare.
    support = (2 if self.interpolation == 'bicubic' else 1) * max(picture.size[1] / height, 1)
    first = max(math.floor(y[0] - support) - 1, 0)
    last = min(math.ceil(y[1] + support) + 1, picture.size[1])
    picture = picture.crop((0, first, picture.size[0], last))
    # One pass at a time, for PIL 13 orders them by the shape. The filter sees what lies around the box.
    picture = picture.resize((columns, last - first), kind, box=(x[0], 0, x[1], last - first))
    picture = picture.crop((left, 0, left + self.size, last - first))
    picture = picture.resize(
      (self.size, rows), kind, box=(0, y[0] - first, self.size, y[1] - first)
    )
    pixels = np.array(picture.crop((0, top, self.size, top + self.size)))
    return pixels.reshape(self.size, self.size, -1)

  def _span(self, length: int, resized: int) -> tuple[tuple[float, float], int, int]:
    """Returns which part of a side `length` to resize, to how much, and where in that the cut starts."""
    start = round((resized - self.size) / 2)
    parts = resized // math.gcd(length, resized)
    # PIL holds the box in float32: these places, and all that it computes from them, are exact.
    exact = parts & (parts - 1) == 0 and length * parts <= 2**24
    if exact or self.draft:
      return (start * length / resized, (start + self.size) * length / resized), self.size, 0
    return (0, length), resized, start


def _open(data: bytes, draft: int | None) -> Any:
  from PIL import Image

  where = f'{data.origin}: ' if hasattr(data, 'origin') else ''
  try:
    picture = Image.open(io.BytesIO(data))
    if draft:
      # Pillow takes the largest reduction that leaves width and height at least as asked.
      picture.draft('RGB', (draft, draft))
    picture.load()
  # Damaged files end in errors of many kinds (SyntaxError, struct.error, DecompressionBombError).
  except Exception as error:
    raise ValueError(f'{where}cannot decode an image of {len(data)} bytes: {error}') from error
  if picture.mode.startswith('I;16') or (picture.mode == 'I' and picture.format == 'PNG'):
    pixels = np.asarray(picture).astype(np.int64)
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert('RGB')
  if picture.mode in ('I', 'F'):
    kind = '32-bit integers' if picture.mode == 'I' else 'floats'
    raise ValueError(
      f'{where}the pixels are {kind} of an unknown range: bring them to uint8 in a file of their own.'
    )
  return picture if picture.mode == 'RGB' else picture.convert('RGB')
