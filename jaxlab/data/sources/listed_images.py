"""Image files named by a list, as the long-tailed splits of large data sets are published."""

import codecs
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from jaxlab.data.sources.image_file import read_image
from jaxlab.data.sources.source import Record, check_labels


def read_split_file(path: str | os.PathLike) -> tuple[tuple[str, ...], np.ndarray]:
  """Reads a published list of a long-tailed set: a line `relative/path label` for every image.

  ImageNet-LT and Places-LT (Liu et al. 2019) and iNaturalist 2018 (Kang et al. 2020) come so.

  Returns:
    The paths in the order of the file, and their labels, int32 `[records]`.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: an empty file, one that is no UTF-8 text (a byte order mark is fine), or a line of another
      form or with a label beyond int32, with its number.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'there is no split file {path}; it is published with the data set.')
  names, labels = [], []
  for number, line in enumerate(_text(path).splitlines(), 1):
    if not line.strip():
      continue
    name, _, label = line.strip().rpartition(' ')
    if not name.strip() or not label.isdecimal():
      raise ValueError(f'{path}:{number} is {line!r}, expected `relative/path label`.')
    if int(label) > np.iinfo(np.int32).max:
      raise ValueError(f'{path}:{number} has label {label}, expected one below 2**31.')
    names.append(name.strip())
    labels.append(int(label))
  if not names:
    raise ValueError(f'{path} lists no images.')
  return tuple(names), np.array(labels, np.int32)


def _text(path: pathlib.Path) -> str:
  content = path.read_bytes()
  if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    raise ValueError(f'{path}:1 is UTF-16 text, expected UTF-8: save it anew.')
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    number = content[: error.start].count(b'\n') + 1
    line = content.splitlines()[number - 1]
    raise ValueError(
      f'{path}:{number} is {line!r}, which is no UTF-8 (Latin-1?): save the file anew.'
    ) from None


class ListedImages:
  """Image files named by a list such as `ImageNet_LT_train.txt`; read when asked for.

  Args:
    path: the list, see `read_split_file`.
    root: folder to which the listed paths are relative.
    decode: False leaves `image` as the file's bytes, for `DecodeImage`.
    num_classes: default: the largest label plus one.
    class_names: default: the numbers.

  Attributes:
    labels: int32 `[records]`.
    paths: as they are listed, one a record.

  Raises:
    FileNotFoundError: if the list, the folder, or the first file listed is not there.
    ValueError: a malformed list or labels out of range.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    root: str | os.PathLike,
    decode: bool = True,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
  ):
    self.paths, self.labels = read_split_file(path)
    self._root, self._decode = pathlib.Path(root), decode
    if num_classes is None:
      num_classes = len(class_names) if class_names else int(self.labels.max()) + 1
    check_labels(self.labels, num_classes)
    self.num_classes = num_classes
    self.class_names = tuple(class_names or map(str, range(num_classes)))
    if len(self.class_names) != num_classes:
      raise ValueError(f'{len(self.class_names)} class_names for {num_classes} classes.')
    first = self._root / self.paths[0]
    if not first.is_file():
      raise FileNotFoundError(
        f'{first} is not there, the first image of {path}; root must be the folder to which the listed '
        'paths are relative.'
      )

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> Record:
    path = self._root / self.paths[index]
    image = read_image(path, self._decode)
    return {'image': image, 'label': self.labels[index], 'index': np.int32(index)}
