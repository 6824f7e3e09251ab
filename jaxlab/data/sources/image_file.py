"""Image files on disk: which names are images, and bytes that remember their file."""

import pathlib

from jaxlab.data.transforms.decode import decode_image

EXTENSIONS = frozenset({'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.ppm', '.tif', '.tiff'})


class FileBytes(bytes):
  """The bytes of a file, which know where they are from: a reader that fails on them can say it.

  Attributes:
    origin: the file's path, or what else names the record.
  """

  origin: str

  def __new__(cls, content: bytes, origin: str) -> 'FileBytes':
    """Returns `content` with its `origin`."""
    made = super().__new__(cls, content)
    made.origin = origin
    return made

  def __reduce__(self) -> tuple:
    return FileBytes, (bytes(self), self.origin)


def visible(name: str) -> bool:
  """Returns whether a file or folder holds data: `.ipynb_checkpoints`, `._a.png` and `__MACOSX` do not."""
  return not name.startswith('.') and name != '__MACOSX'


def image_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the image files below a folder, in all its visible subfolders, by name."""
  found = (path for path in folder.rglob('*') if path.suffix.lower() in EXTENSIONS)
  return sorted(path for path in found if all(map(visible, path.relative_to(folder).parts)))


def read_image(path: pathlib.Path, decode: bool) -> object:
  """Returns the pixels of an image file, uint8 `[height, width, 3]`, or without `decode` its `FileBytes`."""
  content = FileBytes(path.read_bytes(), str(path))
  return decode_image(content) if decode else content
