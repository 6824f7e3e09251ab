"""The tasks of VTAB-1k out of the TFDS catalogue: which parts of which data set, and their labels."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxlab.data.protocols.vtab import (
  CLEVR_DISTANCES,
  KITTI_DISTANCES,
  NO_VEHICLE,
  VTAB_TASKS,
  clevr_count_label,
  distance_bin,
  grouped_label,
  split_800_200,
)
from jaxlab.data.sources.catalogue import Catalogue
from jaxlab.data.sources.source import Record, Source

VEHICLES = 3  # the first of KITTI's types: car, van, truck


class Origin(NamedTuple):
  """Where a task comes from.

  Attributes:
    train: split of the catalogue that the first 800 images are of.
    held_out: that the next 200 are of: the official validation, or the end of the training images.
    test: the test images.
    name: of the data set in the catalogue, where it has a configuration; None: `VtabTask.tfds`.
    fields: features that the label is made of; none: the feature `label`.
    label: `record -> label` of these.
  """

  train: str = 'train[:90%]'
  held_out: str = 'train[90%:]'
  test: str = 'test'
  name: str | None = None
  fields: tuple[str, ...] = ()
  label: Callable[[Record], Any] = lambda record: record['label']


def _clevr_distance(record: Record) -> np.ndarray:
  nearest = np.min(np.asarray(record['objects']['pixel_coords'])[:, 2])
  return distance_bin(nearest, CLEVR_DISTANCES, VTAB_TASKS['clevr_dist'].num_classes)


def _kitti_distance(record: Record) -> np.ndarray:
  objects = record['objects']
  depths = np.asarray(objects['location'], np.float64).reshape(-1, 3)[:, 2]
  depths = depths[np.asarray(objects['type']) < VEHICLES]
  nearest = depths.min() if len(depths) else NO_VEHICLE
  return distance_bin(nearest, KITTI_DISTANCES, VTAB_TASKS['kitti'].num_classes)


_PARTED = Origin('train', 'validation')
_SIXTY = Origin('train[:60%]', 'train[60%:80%]', 'train[80%:]')
_CLEVR = Origin(test='validation', fields=('objects',))
_DSPRITES = Origin('train[:80%]', 'train[80%:90%]', 'train[90%:]')
_NORB = Origin('train', 'test[:50%]', 'test[50%:]')
ORIGINS: dict[str, Origin] = {
  'cifar_100': Origin(),
  'caltech101': Origin(),
  'dtd': _PARTED,
  'flowers102': _PARTED,
  'pets': Origin(),
  'svhn': Origin(),
  'sun397': _PARTED._replace(name='sun397/tfds'),
  'patch_camelyon': _PARTED,
  'eurosat': _SIXTY._replace(name='eurosat/rgb'),
  'resisc45': _SIXTY,
  'diabetic_retinopathy': _PARTED._replace(name='diabetic_retinopathy_detection/btgraham-300'),
  'clevr_count': _CLEVR._replace(
    label=lambda record: clevr_count_label(len(record['objects']['size']))
  ),
  'clevr_dist': _CLEVR._replace(label=_clevr_distance),
  'dmlab': _PARTED,
  'kitti': _PARTED._replace(fields=('objects',), label=_kitti_distance),
  'dsprites_loc': _DSPRITES._replace(
    fields=('label_x_position',),
    label=lambda record: grouped_label(record['label_x_position'], 32),
  ),
  'dsprites_ori': _DSPRITES._replace(
    fields=('label_orientation',),
    label=lambda record: grouped_label(record['label_orientation'], 40),
  ),
  'smallnorb_azi': _NORB._replace(
    fields=('label_azimuth',), label=lambda record: record['label_azimuth']
  ),
  'smallnorb_ele': _NORB._replace(
    fields=('label_elevation',), label=lambda record: record['label_elevation']
  ),
}
GRAY = ('dsprites_loc', 'dsprites_ori', 'smallnorb_azi', 'smallnorb_ele')


class VtabImages:
  """A task of VTAB-1k; read when asked for.

  Args:
    split: 'train800val200' or 'train', the 1000 images of the final training; 'train800' and 'val200', on
      which hyper-parameters are chosen; 'test', all test images.
    task: of `VTAB_TASKS`.
    decode: False leaves color images as encoded bytes, for `DecodeImage`; gray ones are decoded to three
      equal channels either way, dSprites' black and white as 0 and 255.
    data_dir: where TFDS keeps its data.

  Raises:
    ValueError: for an unknown task or split, or labels that cannot be.
    FileNotFoundError: if the data set is not prepared; the message holds the command that does it.
  """

  def __init__(
    self,
    split: str = 'train',
    *,
    task: str,
    decode: bool = False,
    data_dir: str | os.PathLike | None = None,
  ):
    if task not in ORIGINS:
      raise ValueError(f'task={task!r}: VTAB-1k has {", ".join(ORIGINS)}.')
    known = ('train', 'train800val200', 'train800', 'val200', 'test')
    if split not in known:
      raise ValueError(f'split={split!r}: expected one of {", ".join(known)}.')
    own, self._gray, self._task = ORIGINS[task], task in GRAY, task
    self.num_classes = VTAB_TASKS[task].num_classes
    self.class_names = tuple(map(str, range(self.num_classes)))
    name = own.name or VTAB_TASKS[task].tfds
    options = {'data_dir': data_dir, 'decode': decode or self._gray, 'fields': own.fields}

    def part(split: str) -> Source:
      return Catalogue(name, split, **options, label=None if own.fields else 'label')

    if split == 'test':
      test = part(own.test)
      self._parts = [(test, np.arange(len(test)))]
    else:
      train, held = part(own.train), part(own.held_out)
      both = list(zip((train, held), split_800_200(len(train), len(held)), strict=True))
      self._parts = {'train800': both[:1], 'val200': both[1:]}.get(split, both)
    self._ends = np.cumsum([len(rows) for _, rows in self._parts])

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}.')
    place = int(np.searchsorted(self._ends, index, side='right'))
    source, rows = self._parts[place]
    record = source[int(rows[index - (self._ends[place - 1] if place else 0)])]
    image = record['image']
    if self._gray:
      bright = 255 if self._task.startswith('dsprites') else 1
      image = np.repeat(image * np.uint8(bright), 3, axis=-1)
    label = np.int32(ORIGINS[self._task].label(record))
    return {'image': image, 'label': label, 'index': np.int32(index)}
