"""Image files in a folder a class."""

import os
import pathlib
from typing import Any

import numpy as np

from jaxlab.data.sources.source import Record


class ImageFolder:
  """Image files in one subfolder per class: `root/<class>/**/*.jpg`; classes and files sorted by name.

  Args:
    root: the folder.
    decode: False leaves `image` as the file's bytes, for `DecodeImage`.

  Attributes:
    class_names: of the labels 0, 1, ...
    num_classes: their number.
    labels: int32 `[records]`, known without reading a file.

  Raises:
    FileNotFoundError: if root is no folder.
    ValueError: if it has no subfolders, or a class has no images.
  """

  extensions = frozenset({'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.ppm', '.tif', '.tiff'})

  def __init__(self, root: str | os.PathLike, decode: bool = True):
    root = pathlib.Path(root)
    if not root.is_dir():
      raise FileNotFoundError(f'root {root} is not a folder.')
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith('.'))
    if not folders:
      raise ValueError(f'{root} has no subfolders; expected one per class: {root}/<class>/<image>.')
    self.class_names = tuple(folder.name for folder in folders)
    self.num_classes = len(folders)
    self._files: list[tuple[pathlib.Path, int]] = []
    for label, folder in enumerate(folders):
      files = sorted(p for p in folder.rglob('*') if p.suffix.lower() in self.extensions)
      if not files:
        raise ValueError(f'class folder {folder} holds no images ({", ".join(self.extensions)}).')
      self._files += [(file, label) for file in files]
    self.labels = np.array([label for _, label in self._files], np.int32)
    self._decode = decode

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Record:
    path, label = self._files[index]
    image: Any = path.read_bytes()
    if self._decode:
      from jaxlab.data.transforms.decode import decode_image

      try:
        image = decode_image(image)
      except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return {'image': image, 'label': np.int32(label), 'index': np.int32(index)}
