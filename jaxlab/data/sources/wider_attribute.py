"""WIDER Attribute: persons in photographs, each with fourteen attributes."""

import json
import os
import pathlib

import numpy as np

from jaxlab.data.sources.image_file import read_image
from jaxlab.data.sources.source import Record


class WiderAttribute:
  """Boxes of persons, cut out of photographs, with the attributes that each shows (Li et al. 2016).

  A record holds `image` (uint8, of the box's size), `multi_label` (float32 `[num_classes]`, 1 for an
  attribute that is there, 0 for one that is not or is not specified), `known` (float32 `[num_classes]`, 0
  where it is not specified) and `index`.

  Args:
    path: the annotations as they are published, `wider_attribute_trainval.json` or
      `wider_attribute_test.json`: `images`, each with a `file_name` and `targets`, each with `bbox` (x, y,
      width, height) and `attribute` (1, -1 for one that is not there, 0 for one that is not specified); and
      `attribute_id_map`, the names.
    root: folder to which file names are relative.

  Raises:
    FileNotFoundError: if there are no such annotations, or their first image is not below `root`.
    ValueError: if they are of another form; it names the first image that is. When such a record is
      asked for, for a box outside of its image.
  """

  def __init__(self, path: str | os.PathLike, root: str | os.PathLike):
    path, self._root = pathlib.Path(path), pathlib.Path(root)
    if not path.is_file():
      raise FileNotFoundError(
        f'there are no annotations {path}; they come with the data set, '
        'mmlab.ie.cuhk.edu.hk/projects/WIDERAttribute.html.'
      )
    try:
      found = json.loads(path.read_text('utf-8'))
      names = sorted(found['attribute_id_map'].items(), key=lambda item: int(item[0]))
      self.class_names = tuple(name for _, name in names)
      images = [(image['file_name'], image['targets']) for image in found['images']]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(
        f'{path}: expected JSON with attribute_id_map and images, each with file_name and targets: {error!r}.'
      ) from error
    self.num_classes = len(self.class_names)
    self._boxes = [self._box(path, name, target) for name, targets in images for target in targets]
    if not self._boxes:
      raise ValueError(f'{path} lists no persons.')
    if not (first := self._root / self._boxes[0][0]).is_file():
      raise FileNotFoundError(
        f'{first} is not there, the first image of {path}; root must be the folder to which file names are '
        'relative.'
      )

  def _box(self, path: pathlib.Path, name: str, target: dict) -> tuple[str, np.ndarray, np.ndarray]:
    """Returns the file, (x0, y0, x1, y1), and the attributes of a person."""
    try:
      x, y, width, height = map(float, target['bbox'])
      told = np.asarray(target['attribute'], np.int64)
      right = told.shape == (self.num_classes,) and np.isin(told, (-1, 0, 1)).all()
    except (ValueError, KeyError, TypeError):
      right = False
    if not right:
      raise ValueError(
        f'{path}: a person in {name} is {target!r}, expected bbox (x, y, width, height) and attribute, '
        f'{self.num_classes} values of 1, 0 and -1.'
      )
    edges = np.array([x, y, x + width, y + height])
    return name, edges, told.astype(np.int8)

  def __len__(self) -> int:
    return len(self._boxes)

  def __getitem__(self, index: int) -> Record:
    name, edges, told = self._boxes[index]
    image = read_image(self._root / name, decode=True)
    limits = [image.shape[1], image.shape[0]] * 2
    # What lies beyond the photograph is cut off; at least one pixel a side is left.
    x0, y0, x1, y1 = np.clip(np.rint(edges).astype(int), 0, limits)
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
    if x1 > limits[0] or y1 > limits[1]:
      raise ValueError(
        f'person {index}: the box {edges.tolist()} is outside of {name}, {limits[:2]} pixels.'
      )
    return {
      'image': np.ascontiguousarray(image[y0:y1, x0:x1]),
      'multi_label': (told == 1).astype(np.float32),
      'known': (told != 0).astype(np.float32),
      'index': np.int32(index),
    }
