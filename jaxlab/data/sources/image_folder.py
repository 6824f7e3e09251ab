"""Image files in a folder a class."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from jaxlab.data.sources.image_file import EXTENSIONS, image_files, read_image, visible
from jaxlab.data.sources.source import Record


class ImageFolder:
  """Image files in one subfolder per class: `root/<class>/**/*.jpg`; classes and files sorted by name.

  Hidden files and folders (`._a.jpg`, `.ipynb_checkpoints`) and `__MACOSX` are no data.

  Args:
    root: the folder.
    decode: False leaves `image` as the file's bytes, for `DecodeImage`.
    class_names: of the labels 0, 1, ..., e.g. those of the training split (`class_folders`); folders may be
      missing. None: the folders here.

  Attributes:
    class_names: of the labels 0, 1, ...
    num_classes: their number.
    labels: int32 `[records]`, known without reading a file.
    paths: of the files, one a record.

  Raises:
    FileNotFoundError: if root is no folder.
    ValueError: if it has no subfolders, a class has no images, or a folder is not among `class_names`.
  """

  def __init__(
    self,
    root: str | os.PathLike,
    decode: bool = True,
    class_names: Sequence[str] | None = None,
  ):
    root, here = pathlib.Path(root), class_folders(root)
    self.class_names = tuple(here if class_names is None else class_names)
    self.num_classes = len(self.class_names)
    if unknown := sorted(set(here) - set(self.class_names)):
      raise ValueError(
        f'{root} has {len(unknown)} class folders that are not among the {self.num_classes} classes: '
        f'{", ".join(unknown[:5])}; the classes are {", ".join(self.class_names[:5])}, ...'
      )
    labels = {name: label for label, name in enumerate(self.class_names)}
    self._files: list[tuple[pathlib.Path, int]] = []
    for name in here:
      files = image_files(root / name)
      if not files:
        raise ValueError(f'class folder {root / name} holds no images ({", ".join(EXTENSIONS)}).')
      self._files += [(file, labels[name]) for file in files]
    self.labels = np.array([label for _, label in self._files], np.int32)
    self.paths = tuple(str(file) for file, _ in self._files)
    self._decode = decode

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Record:
    path, label = self._files[index]
    image = read_image(path, self._decode)
    return {'image': image, 'label': np.int32(label), 'index': np.int32(index)}


def class_folders(root: str | os.PathLike) -> tuple[str, ...]:
  """Returns the names of the class folders in `root`, sorted: the classes of a split.

  Raises:
    FileNotFoundError: if root is no folder.
    ValueError: if it has no subfolders.
  """
  root = pathlib.Path(root)
  if not root.is_dir():
    raise FileNotFoundError(f'root {root} is not a folder.')
  folders = sorted(path.name for path in root.iterdir() if path.is_dir() and visible(path.name))
  if not folders:
    raise ValueError(f'{root} has no subfolders; expected one per class: {root}/<class>/<image>.')
  return tuple(folders)
