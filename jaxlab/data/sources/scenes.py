"""Scenes: objects of a source pasted at seeded random places on plain or textured canvases.

Every record is computed from `(seed, index)` when it is asked for; nothing is stored.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxlab.data.sources.source import Record, Source, in_memory

Range = int | tuple[int, int]
NOISE_CELLS = 18 / 64  # cells of smooth noise a pixel
MASK_LEVEL = 48  # gray level from which a pixel of a glyph belongs to its mask
ANNOTATIONS = ('boxes', 'box_labels', 'box_mask', 'masks', 'multi_label')


class Scenes:
  """Images composed of source objects, with boxes, masks and labels.

  The main object gives the record's `label`; it is pasted last, so nothing hides it. Each object is
  resized to a square of random side (PIL, bilinear, with antialias when it shrinks). Gray objects are
  light on dark glyphs: they replace the canvas by `object + canvas * (1 - object / 255)`, which on a
  plain canvas is the object itself. RGB objects are opaque squares. An object that would cover more
  than `max_overlap` of another one's box (or be covered so) at `places` random places is left out.

  Args:
    source: gray or RGB objects; it is held in memory.
    num_objects: how many, or the (lowest, highest) number, drawn per scene.
    canvas: side, or (height, width), of the scene in pixels.
    side: the objects' (lowest, highest) side in pixels.
    texture: strength of the canvas texture from 0 (plain black) to 1 (strong and unique to each
      scene, by which instance discrimination can tell scenes apart without looking at objects).
    places: tried for an object before it is left out.
    ground: the canvas under objects: 'waves', blobs and a grating; or 'noise', smooth noise of 18 cells a
      side of 64 pixels (0.35 of white at most) and noise of pixels (0.1), on which random networks localize.
    blend: how gray objects are pasted: 'over', as above; or 'lighter', the lighter of object and canvas.
    boxes: what a box is around: 'glyph', the visible pixels of an object before others hide it; or
      'square', all that was pasted.
    gap: pixels that lie at least between two objects' squares, in rows or columns; None: objects overlap by
      `max_overlap` at most.
    max_overlap: share of the smaller of two squares that the other one may cover, from 0 to 1.
    imbalance: ratio of the most to the least frequent class, whose frequencies fall exponentially
      with the class number (Cui et al. 2019); 1 is balanced.
    length: number of scenes; default: as many as objects.
    pastes: instead of drawing the main object, show each of the source's objects in turn, `pastes`
      times in a row: scene i shows object i // pastes. Excludes `imbalance` and `length`.
    annotations: which of the fields below records hold, by name, besides `image`, `label` and `index`; True:
      all, False: none.
    seed: of everything.

  A record holds, besides `image` (uint8 `[height, width, channels]`), `label` (main object) and `index`:
    boxes: float32 `[max_objects, 4]`, (y0, x0, y1, x1) in pixels, half open, around the whole object, hidden
      parts included; row 0 is the main object, unused rows are 0.
    box_labels: int32 `[max_objects]`, unused -1.
    box_mask: bool `[max_objects]`, which rows are used.
    masks: bool `[max_objects, height, width]`, the visible pixels of each object.
    multi_label: float32 `[num_classes]`, 1 for each class that is present.

  Raises:
    ValueError: if an object does not fit on the canvas, or an option is out of range.
  """

  def __init__(
    self,
    source: Source,
    *,
    num_objects: Range = 1,
    canvas: Range = 64,
    side: Range = (20, 32),
    texture: float = 0.0,
    places: int = 10,
    ground: Literal['waves', 'noise'] = 'waves',
    blend: Literal['over', 'lighter'] = 'over',
    boxes: Literal['glyph', 'square'] = 'glyph',
    gap: int | None = None,
    max_overlap: float = 0.25,
    imbalance: float = 1.0,
    length: int | None = None,
    pastes: int | None = None,
    annotations: bool | Sequence[str] = True,
    seed: int = 0,
  ):
    source = in_memory(source)
    self._images, self._labels = source.arrays['image'], source.arrays['label']
    self.num_classes, self.class_names = source.num_classes, source.class_names
    self._counts = _range('num_objects', num_objects)
    self._canvas = _range('canvas', canvas, ordered=False)
    self._sides = _range('side', side)
    if self._sides[1] > min(self._canvas):
      raise ValueError(
        f'side {self._sides} does not fit on a canvas of {self._canvas[0]}x{self._canvas[1]} pixels.'
      )
    if self._images.dtype != np.uint8 or self._images.shape[-1] not in (1, 3):
      raise ValueError(
        f'source images are {self._images.dtype}{self._images.shape[1:]}, expected uint8 with 1 or 3 '
        'channels.'
      )
    if not 0 <= texture <= 1:
      raise ValueError(f'texture is {texture}, expected a strength in [0, 1].')
    if places < 1:
      raise ValueError(f'places is {places}, expected a number >= 1.')
    if annotations is True or not annotations:
      annotations = ANNOTATIONS if annotations else ()
    if unknown := sorted(set(annotations) - set(ANNOTATIONS)):
      raise ValueError(f'annotations: {unknown} are none of {ANNOTATIONS}.')
    for name, value, known in (
      ('ground', ground, ('waves', 'noise')),
      ('blend', blend, ('over', 'lighter')),
      ('boxes', boxes, ('glyph', 'square')),
    ):
      if value not in known:
        raise ValueError(f'{name} is {value!r}, expected one of {known}.')
    if gap is not None and gap < 0:
      raise ValueError(f'gap is {gap}, expected a number of pixels, or None.')
    if not 0 <= max_overlap <= 1:
      raise ValueError(f'max_overlap is {max_overlap}, expected a share in [0, 1].')
    self._ground, self._blend, self._boxes, self._gap = ground, blend, boxes, gap
    self._max_overlap = max_overlap
    self._places = places
    if imbalance < 1:
      raise ValueError(f'imbalance is {imbalance}, expected a ratio >= 1.')
    if pastes is not None and (pastes < 1 or imbalance != 1 or length is not None):
      raise ValueError(
        f'pastes is {pastes}: expected >= 1, without imbalance and length (every object is shown '
        'equally often).'
      )
    self._texture, self._pastes, self._seed = texture, pastes, seed
    self._annotations = tuple(annotations)
    if length is not None and length < 1:
      raise ValueError(f'length is {length}, expected a number >= 1.')
    self._length = len(source) * pastes if pastes else (length or len(source))
    self._members = [np.flatnonzero(self._labels == c) for c in range(self.num_classes)]
    weights = imbalance ** (-np.arange(self.num_classes) / max(1, self.num_classes - 1))
    weights *= [len(members) > 0 for members in self._members]
    self._class_ends = np.cumsum(weights) / np.sum(weights)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < self._length:
      raise IndexError(f'index {index} is out of range 0..{self._length - 1}.')
    rng = np.random.default_rng((self._seed, index))
    low, high = self._counts
    count = low if low == high else int(rng.integers(low, high + 1))
    objects = [index // self._pastes] if self._pastes else []
    objects += [self._draw(rng) for _ in range(count - len(objects))]
    squares: list[tuple[int, int, int] | None] = []
    for _ in objects:
      squares.append(self._place(rng, squares))
    image = self._background(rng)
    shown = []
    # From the last to the main object, so that the main one is on top.
    for slot in reversed(range(count)):
      if squares[slot] is not None:
        top, left, side = squares[slot]
        patch = _resize(self._images[objects[slot]], side)
        part = image[top : top + side, left : left + side]
        part[:] = self._pasted(part, patch)
        shown.append((slot, top, left, patch))
    label = self._labels[objects[0]]
    record = {'image': np.rint(image).astype(np.uint8), 'label': label, 'index': np.int32(index)}
    if self._annotations:
      found = self._annotate(shown, [self._labels[i] for i in objects])
      record.update({name: found[name] for name in self._annotations})
    return record

  def _draw(self, rng: np.random.Generator) -> int:
    """Draws a class by frequency, then one of its objects."""
    label = int(np.searchsorted(self._class_ends, rng.random(), side='right'))
    members = self._members[min(label, self.num_classes - 1)]
    return int(members[rng.integers(len(members))])

  def _place(
    self, rng: np.random.Generator, others: list[tuple[int, int, int] | None]
  ) -> tuple[int, int, int] | None:
    """Draws (top, left, side) with little overlap, or None; the first object always gets a place."""
    height, width = self._canvas
    for _ in range(self._places):
      side = int(rng.integers(self._sides[0], self._sides[1] + 1))
      top = int(rng.integers(0, height - side + 1))
      left = int(rng.integers(0, width - side + 1))
      square = (top, left, side)
      if all(other is None or self._apart(square, other) for other in others):
        return square
    return None

  def _apart(self, a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """Says whether two squares (top, left, side) are as far from each other as they must be."""
    if self._gap is None:
      return _overlap(a, b) <= self._max_overlap
    between = [max(a[axis], b[axis]) - min(a[axis] + a[2], b[axis] + b[2]) for axis in (0, 1)]
    return max(between) >= self._gap

  def _pasted(self, part: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """Returns a part of the canvas with an object on it."""
    if patch.shape[-1] != 1:
      return patch
    if self._blend == 'lighter':
      return np.maximum(part, patch)
    return patch + part * (1 - patch / np.float32(255))

  def _background(self, rng: np.random.Generator) -> np.ndarray:
    """Returns a canvas: black, or blobs and a grating that no other scene has."""
    height, width = self._canvas
    channels = self._images.shape[-1]
    if not self._texture:
      return np.zeros((height, width, channels), np.float32)
    if self._ground == 'noise':
      cells = [max(2, round(side * NOISE_CELLS)) for side in (height, width)]
      smooth = _blobs(rng, cells, (height, width), channels)
      pixels = rng.random((height, width, channels), np.float32)
      return 255 * np.float32(self._texture) * (0.35 * smooth + 0.1 * pixels)
    cells = int(rng.integers(3, 9))
    blobs = _blobs(rng, (cells, cells), (height, width), channels)
    fy, fx = rng.normal(size=2) * np.pi / 4  # radians a pixel: periods of mostly 5 pixels and more
    wave = fy * np.arange(height)[:, None] + fx * np.arange(width) + rng.uniform(0, 2 * np.pi)
    grating = 0.5 + 0.5 * np.sin(wave, dtype=np.float32)[..., None]
    # At full strength up to 60 % of white, so that objects remain lighter than their ground.
    return 255 * 0.6 * np.float32(self._texture) * (0.6 * blobs + 0.4 * grating)

  def _annotate(
    self, shown: list[tuple[int, int, int, np.ndarray]], labels: list
  ) -> dict[str, Any]:
    slots = self._counts[1]
    boxes = np.zeros((slots, 4), np.float32)
    box_labels = np.full(slots, -1, np.int32)
    masks = np.zeros((slots, *self._canvas), bool)
    multi_label = np.zeros(self.num_classes, np.float32)
    for slot, top, left, patch in shown:
      side = len(patch)
      glyph = patch[..., 0] >= MASK_LEVEL if patch.shape[-1] == 1 else np.ones((side, side), bool)
      rows, columns = np.flatnonzero(glyph.any(axis=1)), np.flatnonzero(glyph.any(axis=0))
      # Of an object darker than the level it is the whole square, too.
      if self._boxes == 'square' or not rows.size:
        rows = columns = np.array([0, side - 1])
      boxes[slot] = (top + rows[0], left + columns[0], top + rows[-1] + 1, left + columns[-1] + 1)
      box_labels[slot] = labels[slot]
      multi_label[labels[slot]] = 1
      area = np.s_[top : top + side, left : left + side]
      for hidden in masks:
        hidden[area] &= ~glyph
      masks[slot][area] = glyph
    return {
      'boxes': boxes,
      'box_labels': box_labels,
      'box_mask': box_labels >= 0,
      'masks': masks,
      'multi_label': multi_label,
    }


def pasted(
  source: Source, *, canvas: Range = 16, side: Range = (10, 16), pastes: int = 1, seed: int = 0
) -> Scenes:
  """Returns `source` with each object at a random place and scale on a plain canvas.

  Record i shows object i // pastes and holds `image`, `label` and `index`. The defaults make a small
  data set on which random features fail and self-supervised ones do not: raw 8x8 digits are too easy
  (untrained networks reach 96 % with nearest neighbors).

  Args:
    source: the objects, e.g. `Digits('train')`.
    canvas: side, or (height, width), in pixels.
    side: (lowest, highest) side of the pasted object.
    pastes: records per object, to get more test queries from few objects (they are not independent).
    seed: of places and scales.
  """
  return Scenes(source, canvas=canvas, side=side, pastes=pastes, annotations=False, seed=seed)


def canvases(
  source: Source,
  *,
  num_objects: Range = 2,
  canvas: Range = 36,
  side: Range = (15, 19),
  texture: float = 0.0,
  ground: Literal['waves', 'noise'] = 'waves',
  max_overlap: float = 0.25,
  length: int | None = None,
  seed: int = 0,
) -> Scenes:
  """Returns several objects on each canvas, by default a plain black one, without boxes.

  A record holds `image`, `label` (of the main object), `multi_label` (float32 `[num_classes]`, 1 for each
  class that is there) and `index`. Where objects overlap the lighter one is seen.

  Args:
    source: the objects, e.g. `FashionMNIST('train')`; each canvas draws its own.
    num_objects: how many, or the (lowest, highest) number. One that finds no place in a hundred is left out.
    canvas: side, or (height, width), in pixels.
    side: (lowest, highest) side of an object.
    texture: strength of the canvas's texture, see `Scenes`; likewise `ground`.
    ground: kind of the texture.
    max_overlap: share of an object's square that another one may cover; 1: places are drawn without regard to
      the others.
    length: number of canvases; default: as many as objects.
    seed: of everything.
  """
  return Scenes(
    source, num_objects=num_objects, canvas=canvas, side=side, places=100, blend='lighter',
    texture=texture, ground=ground, max_overlap=max_overlap, length=length,
    annotations=('multi_label',), seed=seed,
  )  # fmt: skip


def _range(name: str, value: Range, ordered: bool = True) -> tuple[int, int]:
  low, high = (value, value) if isinstance(value, int) else value
  if min(low, high) < 1 or (ordered and low > high):
    raise ValueError(f'{name} is {value}, expected a positive number or a (low, high) of them.')
  return low, high


def _overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
  """Returns the share of the smaller of two squares (top, left, side) that the other one covers."""
  height = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
  width = min(a[1] + a[2], b[1] + b[2]) - max(a[1], b[1])
  return max(0, height) * max(0, width) / min(a[2], b[2]) ** 2


def _resize(image: np.ndarray, side: int) -> np.ndarray:
  from PIL import Image

  gray = image.shape[-1] == 1
  picture = Image.fromarray(image[..., 0] if gray else image)
  resized = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))
  return resized[..., None] if gray else resized


def _blobs(
  rng: np.random.Generator, cells: tuple[int, int], size: tuple[int, int], channels: int
) -> np.ndarray:
  """Returns uniform noise of some cells, interpolated linearly to `[height, width, channels]`."""
  noise = rng.random((*cells, channels), np.float32)
  # [rows, cells] x [channels, cells, cells] x [cells, columns]
  blobs = _linear(size[0], cells[0]) @ np.moveaxis(noise, -1, 0) @ _linear(size[1], cells[1]).T
  return np.moveaxis(blobs, 0, -1)


@functools.lru_cache(maxsize=64)
def _linear(size: int, cells: int) -> np.ndarray:
  """Returns the matrix `[size, cells]` that interpolates `cells` grid values linearly."""
  position = np.linspace(0, cells - 1, size, dtype=np.float32)[:, None]
  return np.maximum(0, 1 - np.abs(position - np.arange(cells, dtype=np.float32)))
