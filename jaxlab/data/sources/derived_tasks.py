"""Several tasks over the same small objects: what they are, how they lie, how many there are.

A small stand-in for VTAB: natural tasks ask for the objects' classes, specialized ones for classes of images
of another kind, structured ones for what no class says.
"""

from typing import NamedTuple

import numpy as np

from jaxlab.data.sources.scenes import Scenes
from jaxlab.data.sources.source import InMemory, Source, in_memory, materialize

QUARTERS = 4  # turns, quadrants, numbers of objects, sizes


class DerivedTask(NamedTuple):
  """A task over objects.

  Attributes:
    group: 'natural', 'specialized' or 'structured'.
    num_classes: number of labels; None: those of the objects.
  """

  group: str
  num_classes: int | None = None


DERIVED_TASKS: dict[str, DerivedTask] = {
  'plain': DerivedTask('natural'),
  'texture': DerivedTask('natural'),
  'noise': DerivedTask('specialized'),
  'rotation': DerivedTask('structured', QUARTERS),
  'count': DerivedTask('structured', QUARTERS),
  'quadrant': DerivedTask('structured', QUARTERS),
  'size': DerivedTask('structured', QUARTERS),
}


def derived_task(
  objects: Source,
  task: str,
  *,
  canvas: int = 16,
  length: int = 1000,
  noise: float = 40.0,
  texture: float = 0.8,
  seed: int = 0,
) -> InMemory:
  """Returns images of a task; the same whenever they are made.

  Objects are drawn with their classes equally frequent, and pasted at random places:

  - 'plain': one of 5/8 of the canvas and more; its class;
  - 'texture': likewise on a textured canvas;
  - 'noise': likewise, dark on light, with normal noise;
  - 'rotation': likewise, turned by quarters; how many of them, counterclockwise;
  - 'count': one to four, 5/16 to 7/16 of the canvas large, which do not overlap; how many less one;
  - 'quadrant': one of that size; which quadrant its center is in, row by row;
  - 'size': one of 5/16 of the canvas and more; which quarter of the sizes it is in.

  Args:
    objects: gray images with their class.
    task: of `DERIVED_TASKS`.
    canvas: side of the images in pixels, at least 16.
    length: number of images.
    noise: deviation of the noise in gray levels.
    texture: strength of the texture, see `Scenes`.
    seed: of objects, places, texture and noise.

  Raises:
    ValueError: for an unknown task, a smaller canvas or fewer images than one.

  >>> from jaxlab.data import Digits
  >>> derived_task(Digits('train'), 'count', length=3).num_classes
  4
  """
  if task not in DERIVED_TASKS:
    raise ValueError(f'task={task!r}: expected one of {", ".join(DERIVED_TASKS)}.')
  if canvas < 16 or length < 1:
    raise ValueError(f'canvas={canvas}, length={length}: expected at least 16 pixels and 1 image.')
  least, small, large = (canvas * share // 16 for share in (5, 7, 10))
  sides = {'count': (least, small), 'quadrant': (least, small), 'size': (least, canvas)}
  options = {'canvas': canvas, 'side': sides.get(task, (large, canvas)), 'length': length}
  source, classes = in_memory(objects), DERIVED_TASKS[task].num_classes
  if task == 'rotation':
    source = turned(source)
  elif task == 'texture':
    options['texture'] = texture
  elif task == 'count':
    options |= {'num_objects': (1, QUARTERS), 'gap': 0, 'places': 1000}
  wanted = () if task not in sides else ('boxes', 'box_mask')
  scenes = Scenes(source, **options, boxes='square', annotations=wanted, seed=seed)
  found = materialize(scenes)
  images, labels = found['image'], found['label']
  if task == 'noise':
    drawn = np.random.default_rng((seed, length)).normal(0, noise, images.shape)
    images = np.clip(np.rint(255 - images + drawn), 0, 255).astype(np.uint8)
  elif task == 'count':
    labels = found['box_mask'].sum(1) - 1
  elif task == 'quadrant':
    top, left, bottom, right = found['boxes'][:, 0].T
    labels = 2 * (top + bottom >= canvas) + (left + right >= canvas)
  elif task == 'size':
    side = found['boxes'][:, 0, 2] - found['boxes'][:, 0, 0]
    labels = (side - least) * QUARTERS // (canvas - least + 1)
  names = source.class_names if classes in (None, len(source.class_names)) else None
  arrays = {'image': images, 'label': labels.astype(np.int32)}
  return InMemory(arrays, classes or source.num_classes, names)


def turned(source: InMemory) -> InMemory:
  """Returns square images each turned by no, one, two and three quarters, whose number is their label."""
  images = source.arrays['image']
  every = [np.rot90(images, quarters, (1, 2)) for quarters in range(QUARTERS)]
  labels = np.repeat(np.arange(QUARTERS), len(images))
  names = [str(90 * quarters) for quarters in range(QUARTERS)]
  return InMemory({'image': np.concatenate(every), 'label': labels}, QUARTERS, names)
