"""VTAB-1k (Zhai et al. 2019, arXiv 1910.04867): 19 tasks of 1000 labeled images, in three groups.

Structured tasks ask what no label says: how many objects, how far, how turned. Their labels are made here of
the annotations, as the comparisons of parameter-efficient tuning make them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# Bounds of the bins of the nearest object's distance.
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
NO_VEHICLE = 1000.0  # KITTI's distance of an image without car, van and truck


class VtabTask(NamedTuple):
  """A task of VTAB-1k.

  Attributes:
    group: 'natural', 'specialized' or 'structured'.
    num_classes: number of labels.
    test_images: of the official test split.
    tfds: the data set's name in the TFDS catalogue; None: it is not there.
  """

  group: Literal['natural', 'specialized', 'structured']
  num_classes: int
  test_images: int
  tfds: str | None = None


VTAB_TASKS: dict[str, VtabTask] = {
  'cifar_100': VtabTask('natural', 100, 10_000, 'cifar100'),
  'caltech101': VtabTask('natural', 102, 6_084, 'caltech101'),
  'dtd': VtabTask('natural', 47, 1_880, 'dtd'),
  'flowers102': VtabTask('natural', 102, 6_149, 'oxford_flowers102'),
  'pets': VtabTask('natural', 37, 3_669, 'oxford_iiit_pet'),
  'svhn': VtabTask('natural', 10, 26_032, 'svhn_cropped'),
  'sun397': VtabTask('natural', 397, 21_750, 'sun397'),
  'patch_camelyon': VtabTask('specialized', 2, 32_768, 'patch_camelyon'),
  'eurosat': VtabTask('specialized', 10, 5_400, 'eurosat'),
  'resisc45': VtabTask('specialized', 45, 6_300, 'resisc45'),
  'diabetic_retinopathy': VtabTask('specialized', 5, 42_670, 'diabetic_retinopathy_detection'),
  'clevr_count': VtabTask('structured', 8, 15_000, 'clevr'),
  'clevr_dist': VtabTask('structured', 6, 15_000, 'clevr'),
  'dmlab': VtabTask('structured', 6, 22_735, 'dmlab'),
  'kitti': VtabTask('structured', 4, 711, 'kitti'),
  'dsprites_loc': VtabTask('structured', 16, 73_728, 'dsprites'),
  'dsprites_ori': VtabTask('structured', 16, 73_728, 'dsprites'),
  'smallnorb_azi': VtabTask('structured', 18, 12_150, 'smallnorb'),
  'smallnorb_ele': VtabTask('structured', 9, 12_150, 'smallnorb'),
}


def vtab_group_means(scores: Mapping[str, float]) -> dict[str, float]:
  """Returns the mean score of each group, and `mean`, that of the three groups (not of the 19 tasks).

  Args:
    scores: of all 19 tasks, by the names of `VTAB_TASKS`.

  Raises:
    ValueError: for tasks that are missing or unknown; all are listed.

  >>> scores = {name: 2.0 * (task.group == 'natural') for name, task in VTAB_TASKS.items()}
  >>> {name: round(value, 3) for name, value in vtab_group_means(scores).items()}
  {'natural': 2.0, 'specialized': 0.0, 'structured': 0.0, 'mean': 0.667}
  """
  return group_means(scores, {name: task.group for name, task in VTAB_TASKS.items()})


def group_means(scores: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
  """Returns the mean score of each group of tasks, and `mean`, that of the groups.

  Args:
    scores: by task.
    groups: the group of each task.

  Raises:
    ValueError: for tasks that are missing or unknown; all are listed.

  >>> group_means(
  ...   {'a': 1.0, 'b': 3.0, 'c': 5.0}, {'a': 'natural', 'b': 'natural', 'c': 'structured'}
  ... )
  {'natural': 2.0, 'structured': 5.0, 'mean': 3.5}
  """
  missing, unknown = sorted(groups.keys() - scores), sorted(scores.keys() - groups)
  if missing or unknown:
    raise ValueError(f'scores of tasks: missing {missing}, unknown {unknown}.')
  means = {
    group: float(np.mean([scores[name] for name, own in groups.items() if own == group]))
    for group in dict.fromkeys(groups.values())
  }
  return {**means, 'mean': float(np.mean(list(means.values())))}


def split_800_200(train_size: int, held_out_size: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns positions of the 800 training and the 200 held-out images that hyper-parameters are chosen on.

  The final training is on both, 1000 images.

  Args:
    train_size: images of the training split.
    held_out_size: of the split behind it: the official validation, or the last tenth of the training images.

  Returns:
    The first 800 of the one and the first 200 of the other.

  Raises:
    ValueError: for splits that are smaller.

  >>> [len(part) for part in split_800_200(45000, 5000)]
  [800, 200]
  """
  if train_size < 800 or held_out_size < 200:
    raise ValueError(
      f'{train_size} and {held_out_size} images: expected at least 800 for training and 200 held out.'
    )
  return np.arange(800), np.arange(200)


def distance_bin(
  distances: ArrayLike, bounds: ArrayLike, num_classes: int | None = None
) -> np.ndarray:
  """Returns the largest j with `bounds[j] < distance`, int32; a distance at a bound is in the bin below.

  Args:
    distances: `[...]`: of `CLEVR_DISTANCES` from the camera to the nearest object, of `KITTI_DISTANCES` the
      smallest depth of a car, van or truck, `NO_VEHICLE` where there is none.
    bounds: rising.
    num_classes: of the task, such as `VTAB_TASKS['clevr_dist'].num_classes`: larger bins are errors; None:
      none is.

  Raises:
    ValueError: for distances that are not above the first bound, or not numbers.

  >>> distance_bin([0.1, 8.0, 8.1, 10.5], CLEVR_DISTANCES).tolist()
  [0, 0, 1, 5]
  """
  distances, bounds = np.asarray(distances, np.float64), np.asarray(bounds, np.float64)
  if not (distances > bounds[0]).all():
    raise ValueError(f'distances must be above {bounds[0]:g}, got {np.min(distances)}.')
  found = (np.searchsorted(bounds, distances, side='left') - 1).astype(np.int32)
  if num_classes is not None and (found >= num_classes).any():
    raise ValueError(
      f'distances up to {np.max(distances)} fall into bin {found.max()} of {num_classes} classes.'
    )
  return found


def clevr_count_label(objects: ArrayLike) -> np.ndarray:
  """Returns the labels of numbers of objects, 3 to 10: `objects - 3`, int32.

  Raises:
    ValueError: for other numbers.

  >>> clevr_count_label([3, 10]).tolist()
  [0, 7]
  """
  objects = np.asarray(objects)
  if not np.issubdtype(objects.dtype, np.integer) or ((objects < 3) | (objects > 10)).any():
    raise ValueError(f'objects must be integers from 3 to 10, got {objects}.')
  return (objects - 3).astype(np.int32)


def grouped_label(values: ArrayLike, num_values: int, num_classes: int = 16) -> np.ndarray:
  """Returns the labels of latent values in fewer classes, `floor(value num_classes / num_values)`, int32.

  dSprites' x position has 32 values, its orientation 40; both are asked for in 16 classes.

  Args:
    values: integers, 0 to `num_values - 1`.
    num_values: at least `num_classes`.
    num_classes: number of labels.

  Raises:
    ValueError: for values out of range, or fewer values than classes.

  >>> grouped_label([0, 2, 3, 39], 40).tolist()
  [0, 0, 1, 15]
  """
  values = np.asarray(values)
  if num_values < num_classes or num_classes < 1:
    raise ValueError(f'num_values={num_values} are fewer than num_classes={num_classes}.')
  inside = np.issubdtype(values.dtype, np.integer) and ((values >= 0) & (values < num_values)).all()
  if not inside:
    raise ValueError(f'values must be integers from 0 to {num_values - 1}, got {values}.')
  return (values.astype(np.int64) * num_classes // num_values).astype(np.int32)
