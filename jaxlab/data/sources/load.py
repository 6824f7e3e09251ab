"""Data sets by name, as configurations ask for them."""

import os
from collections.abc import Sequence
from typing import Any

from jaxlab.data.sources.catalogue import (
  Catalogue,
)
from jaxlab.data.sources.completions import Sums, read_completions
from jaxlab.data.sources.derived_tasks import derived_task
from jaxlab.data.sources.embedded import (
  Digits,
  FashionMNIST,
)
from jaxlab.data.sources.image_folder import (
  ImageFolder,
  class_folders,
)
from jaxlab.data.sources.listed_images import ListedImages
from jaxlab.data.sources.photographs import Photographs
from jaxlab.data.sources.point_clouds import PointClouds, digit_points
from jaxlab.data.sources.scenes import Scenes, canvases, pasted
from jaxlab.data.sources.sentences import Sentences
from jaxlab.data.sources.source import (
  InMemory,
  Source,
  in_memory,
)
from jaxlab.data.sources.subset import class_subset
from jaxlab.data.sources.table import load_table
from jaxlab.data.sources.text import ByteText
from jaxlab.data.sources.token_file import TokenFile
from jaxlab.data.sources.valued_images import ValuedImages, rotated_digits
from jaxlab.data.sources.vtab_images import VtabImages
from jaxlab.data.sources.wider_attribute import WiderAttribute


def load(name: str, split: str = 'train', **options: Any) -> Source:
  """Returns the `split` of the data set `name`.

  Args:
    name:

      - `'digits'`: scikit-learn's 8x8 digits; options of `Digits`.
      - `'pasted_digits'`: each at a random place and scale of a plain canvas, or at several (`pastes`), in
        memory; options of `pasted`, and `limit`, the number of records, the first ones.
      - `'digit_canvases'`, `'fashion_canvases'`: two digits, or pieces of Fashion-MNIST, on each plain canvas
        with the labels of both, in memory; options of `canvases`.
      - `'digit_tasks'`, `'fashion_tasks'`: one of several tasks (`task`) over digits, or pieces of
        Fashion-MNIST, in memory; options of `derived_task`.
      - `'vtab'`: a task of VTAB-1k; options of `VtabImages`.
      - `'wider_attribute'`: persons with attributes; options of `WiderAttribute`; the split is the path of
        the annotations.
      - `'digit_scenes'`: several digits on textured canvases with boxes and masks; options of `Scenes`.
      - `'fashion_mnist'`: options of `FashionMNIST`.
      - `'text'`: windows of bytes of the text that comes with Python, or of a file; options of `ByteText`.
      - `'tokens'`: windows of tokens of a `.npy` file, whose path is the split; options of `TokenFile`.
      - `'sums'`: sums of numbers in characters, without or with their working; options of `Sums`.
      - `'completions'`: prompts and completions of a `.npz` file, whose path is the split; options of
        `read_completions`.
      - `'sentences'`: tokens of sentences, padded; options of `Sentences`.
      - `'photographs'`: random crops without labels; options of `Photographs`.
      - `'table'`: rows of numbers, from files or embedded; options of `load_table`.
      - `'digit_points'`: the digits' ink as clouds of points; options of `digit_points`.
      - `'point_clouds'`: ModelNet's text files; options of `PointClouds`.
      - `'rotated_digits'`: digits with their angle as value; options of `rotated_digits`.
      - `'valued_images'`: image files with values by lists; options of `ValuedImages`.
      - `'image_folder'`: options of `ImageFolder`; the split is a subfolder of `root`. Its classes are
        those of the split, or of the absolute path, `classes_of`, by name; without the option those of
        `train`, if there is such a folder; with None its own.
      - `'listed_images'`: files named by a list, whose path is the split; options of `ListedImages`.
      - anything else is looked up in the TFDS catalogue (`'cifar10'`, `'imagenet2012'`); options of
        `Catalogue`.
    split: 'train' or 'test'; TFDS, folders and files have their own names.
    **options: of the source; for `'digits'`, `'fashion_mnist'` and `'text'` also `limit`, to take only so
      many records; for `'[pasted_]digits'`, `'fashion_mnist'`, image folders and the catalogue `classes`, to
      take these alone (see `class_subset`).

  Raises:
    ValueError: for an unknown name, split or option.
    FileNotFoundError: for data that are not there; the message holds the command that brings them.
  """
  try:
    if name == 'digits':
      limit, classes = options.pop('limit', None), options.pop('classes', None)
      return _first(_of_classes(Digits(split, **options), classes), limit)
    if name == 'pasted_digits':
      classes, seed, limit = (
        options.pop(k, v) for k, v in (('classes', None), ('seed', 0), ('limit', None))
      )
      drawn = pasted(Digits(split), seed=_of_split(seed, split), **options)
      return _first(_of_classes(in_memory(drawn), classes), limit)
    if name in ('digit_canvases', 'fashion_canvases', 'digit_tasks', 'fashion_tasks'):
      objects, seed = Digits if name.startswith('digit') else FashionMNIST, options.pop('seed', 0)
      folder = {'folder': options.pop('folder')} if 'folder' in options else {}
      make = canvases if name.endswith('canvases') else derived_task
      return in_memory(make(objects(split, **folder), seed=_of_split(seed, split), **options))
    if name == 'digit_scenes':
      return Scenes(Digits(split), **options)
    if name == 'fashion_mnist':
      limit, classes = options.pop('limit', None), options.pop('classes', None)
      return _first(_of_classes(FashionMNIST(split, **options), classes), limit)
    if name == 'text':
      limit = options.pop('limit', None)
      return _first(ByteText(split, **options), limit)
    if name == 'vtab':
      return VtabImages(split, **options)
    if name == 'wider_attribute':
      return WiderAttribute(split, **options)
    if name == 'tokens':
      return TokenFile(split, **options)
    if name == 'sums':
      return Sums(split, **options)
    if name == 'completions':
      return read_completions(split, **options)
    if name == 'sentences':
      return Sentences(split, **options)
    if name == 'table':
      return load_table(split, **options)
    if name == 'digit_points':
      return digit_points(split, **options)
    if name == 'point_clouds':
      return PointClouds(split, **options)
    if name == 'rotated_digits':
      return rotated_digits(split, **options)
    if name == 'valued_images':
      return ValuedImages(**options)
    if name == 'photographs':
      return Photographs(split, **options)
    if name == 'image_folder':
      if not options.get('root'):
        raise ValueError(
          "data set 'image_folder' needs the option root=, the folder of its splits."
        )
      root = options.pop('root')
      usual = 'train' if os.path.isdir(os.path.join(root, 'train')) else None
      if (classes_of := options.pop('classes_of', usual)) is not None:
        options.setdefault('class_names', class_folders(os.path.join(root, classes_of)))
      classes = options.pop('classes', None)
      return _of_classes(ImageFolder(f'{root}/{split}', **options), classes)
    if name == 'listed_images':
      return ListedImages(split, **options)
    classes = options.pop('classes', None)
    return _of_classes(Catalogue(name, split, **options), classes)
  except TypeError as error:
    raise ValueError(f'data set {name!r}: {error}') from error


def _of_split(seed: int, split: str) -> int:
  """Returns the seed of a split: places are drawn from other streams than those of the other split."""
  return 2 * seed + (split == 'test')


def _first(source: InMemory, limit: int | None) -> InMemory:
  """Returns a source of the first `limit` records; None: the source."""
  if limit is None:
    return source
  arrays = {field: array[:limit] for field, array in source.arrays.items()}
  return InMemory(arrays, source.num_classes, source.class_names)


def _of_classes(source: Source, classes: Sequence[int] | None) -> Source:
  """Returns a source of the records of some classes; None: the source."""
  return source if classes is None else class_subset(source, classes)
