"""Data sets by name, as configurations ask for them."""

from typing import Any

from jaxlab.data.sources.catalogue import (
  Catalogue,
)
from jaxlab.data.sources.embedded import (
  Digits,
  FashionMNIST,
)
from jaxlab.data.sources.image_folder import (
  ImageFolder,
)
from jaxlab.data.sources.scenes import Scenes, pasted
from jaxlab.data.sources.source import (
  InMemory,
  Source,
  in_memory,
)
from jaxlab.data.sources.text import ByteText
from jaxlab.data.sources.token_file import TokenFile


def load(name: str, split: str = 'train', **options: Any) -> Source:
  """Returns the `split` of the data set `name`.

  Args:
    name:

      - `'digits'`: scikit-learn's 8x8 digits; options of `Digits`.
      - `'pasted_digits'`: each at a random place and scale of a plain canvas, in memory; options of
        `pasted`. With `pastes=n` the test split shows each digit n times, the training split once.
      - `'digit_scenes'`: several digits on textured canvases with boxes and masks; options of `Scenes`.
      - `'fashion_mnist'`: options of `FashionMNIST`.
      - `'text'`: windows of bytes of the text that comes with Python, or of a file; options of `ByteText`.
      - `'tokens'`: windows of tokens of a `.npy` file, whose path is the split; options of `TokenFile`.
      - `'image_folder'`: options of `ImageFolder`; the split is a subfolder of `root`.
      - anything else is looked up in the TFDS catalogue (`'cifar10'`, `'imagenet2012'`); options of
        `Catalogue`.
    split: 'train' or 'test'; TFDS, folders and token files have their own names.
    **options: of the source; for `'fashion_mnist'` and `'text'` also `limit`, to take only so many records.

  Raises:
    ValueError: for an unknown name, split or option.
    FileNotFoundError: for data that are not there; the message holds the command that brings them.
  """
  try:
    if name == 'digits':
      return Digits(split, **options)
    if name == 'pasted_digits':
      pastes = options.pop('pastes', 1)
      seed = options.pop('seed', 0)
      # Places are drawn from other streams than those of the other split.
      return in_memory(
        pasted(
          Digits(split),
          pastes=pastes if split == 'test' else 1,
          seed=2 * seed + (split == 'test'),
          **options,
        )
      )
    if name == 'digit_scenes':
      return Scenes(Digits(split), **options)
    if name == 'fashion_mnist':
      limit = options.pop('limit', None)
      return _first(FashionMNIST(split, **options), limit)
    if name == 'text':
      limit = options.pop('limit', None)
      return _first(ByteText(split, **options), limit)
    if name == 'tokens':
      return TokenFile(split, **options)
    if name == 'image_folder':
      root = options.pop('root')
      return ImageFolder(f'{root}/{split}', **options)
    return Catalogue(name, split, **options)
  except TypeError as error:
    raise ValueError(f'data set {name!r}: {error}') from error


def _first(source: InMemory, limit: int | None) -> InMemory:
  """Returns a source of the first `limit` records; None: the source."""
  if limit is None:
    return source
  arrays = {field: array[:limit] for field, array in source.arrays.items()}
  return InMemory(arrays, source.num_classes, source.class_names)
