"""Training sets whose wrong labels are partly of images of no class at all, and whose classes are unequal.

Zhou, Ge & Wu, Friends and Foes in Learning from Noisy Labels (https://arxiv.org/abs/2103.15055), criticize
that noisy training sets are made of balanced ones by exchanging labels. The construction here is a
reconstruction: the paper's own is not public. Host code in NumPy; a generator that is passed in is advanced.
"""

import numpy as np

from jaxlab.data.protocols.label_noise import symmetric_noise
from jaxlab.data.protocols.long_tail import class_counts, exponential_counts

# CIFAR-100's classes that look like classes of CIFAR-10: bus, leopard, lion, pickup truck, streetcar, tiger,
# tractor, wolf.
CIFAR100_LIKE_CIFAR10 = (13, 42, 43, 58, 81, 88, 89, 97)


def make_ncifar(
  rng: np.random.Generator,
  images: np.ndarray,
  labels: np.ndarray,
  ood_images: np.ndarray,
  closed_rate: float,
  open_rate: float,
  imbalance: float = 1.0,
  *,
  max_count: int | None = None,
  replace: bool = False,
) -> dict[str, np.ndarray]:
  """Makes a clean training set unequal, and its labels wrong in two ways.

  1. Class sizes fall exponentially from `max_count` to `max_count / imbalance`, classes in random order.
  2. Closed noise: with probability `closed_rate` a label moves to another class, drawn uniformly.
  3. Open noise: of the examples with each label, a share `open_rate` (rounded down) get images that show none
     of the classes; they keep the label.

  So `(1 - closed_rate) (1 - open_rate)` of the labels are right.

  Args:
    rng: NumPy generator; advanced.
    images: `[records, ...]`.
    labels: integers `[records]`, the true ones, of classes 0 .. C - 1; each has records.
    ood_images: `[others, ...]`, of no class.
    closed_rate: r_c.
    open_rate: r_o, with `closed_rate + open_rate < 1`.
    imbalance: largest class over smallest, at least 1.
    max_count: records of the largest class; None: those of the smallest one in `labels`.
    replace: draw images of no class with replacement if there are too few.

  Returns:
    `image` `[kept, ...]`, `noisy_label` and `true_label` int32 `[kept]`, the latter -1 for images of no
    class; in the order of `images`.

  Raises:
    ValueError: for rates, sizes or labels that are impossible, images of two kinds, or too few of no class.

  References:
    Reconstruction of nCIFAR, section on test beds of the paper above.

  Examples:
    >>> images, labels = np.zeros((40, 2, 2, 1), np.uint8), np.arange(40) % 2
    >>> others = np.ones((20, 2, 2, 1), np.uint8)
    >>> made = make_ncifar(np.random.default_rng(0), images, labels, others, 0.2, 0.25, 2.0)
    >>> (
    ...   len(made['image']),
    ...   int(np.sum(made['true_label'] == -1)),
    ...   int(np.sum(made['image'] != 0)) // 4,
    ... )
    (30, 7, 7)
  """
  if not (closed_rate >= 0 and open_rate >= 0 and closed_rate + open_rate < 1):
    raise ValueError(
      f'closed_rate={closed_rate}, open_rate={open_rate}: expected rates of at least 0 with a sum below 1.'
    )
  if not imbalance >= 1:
    raise ValueError(
      f'imbalance={imbalance}: expected at least 1, the largest class over the smallest.'
    )
  images, ood_images = np.asarray(images), np.asarray(ood_images)
  if len(images) != len(labels):
    raise ValueError(f'{len(images)} images, but {len(labels)} labels.')
  kinds = [(own.shape[1:], own.dtype) for own in (images, ood_images)]
  if kinds[0] != kinds[1]:
    raise ValueError(f'images are {kinds[0]}, ood_images {kinds[1]}: expected one shape and type.')
  rows = _unequal(rng, labels, imbalance, max_count)
  true = np.asarray(labels)[rows].astype(np.int32)
  num_classes = int(true.max()) + 1
  noisy = symmetric_noise(rng, true, closed_rate, num_classes, include_true=False)
  chosen = [
    rng.choice(members, int(open_rate * len(members) + 1e-9), replace=False)
    for members in (np.flatnonzero(noisy == label) for label in range(num_classes))
  ]
  outside = np.sort(np.concatenate(chosen))
  if len(outside) > len(ood_images) and not (replace and len(ood_images)):
    raise ValueError(
      f'ood_images: {len(outside)} are needed, {len(ood_images)} are there; give more, or replace=True.'
    )
  found = images[rows].copy()
  if len(outside):
    again = len(outside) > len(ood_images)
    found[outside] = ood_images[rng.choice(len(ood_images), len(outside), replace=again)]
  true[outside] = -1
  return {'image': found, 'noisy_label': noisy, 'true_label': true}


def _unequal(
  rng: np.random.Generator, labels: np.ndarray, imbalance: float, max_count: int | None
) -> np.ndarray:
  """Returns sorted positions of records whose classes, in random order, have exponential sizes."""
  there = class_counts(labels)
  largest = int(there.min()) if max_count is None else max_count
  counts = np.zeros_like(there)
  counts[rng.permutation(len(there))] = exponential_counts(len(there), largest, imbalance)
  if np.any(counts > there):
    label = int(np.argmax(counts > there))
    raise ValueError(
      f'max_count={max_count}: class {label} should have {counts[label]} records, {there[label]} are there.'
    )
  parts = [
    rng.choice(np.flatnonzero(np.asarray(labels) == label), count, replace=False)
    for label, count in enumerate(counts)
  ]
  return np.sort(np.concatenate(parts))
