"""Records of a task that learning rates are chosen on: those that the training before leaves out."""

from typing import Literal

import numpy as np

# 'last': the data set's order is the split, as that of VTAB-1k's 800 and 200 images; 'by_class': drawn.
Order = Literal['last', 'by_class']


def held_out_rows(
  labels: np.ndarray, count: int, order: Order, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns positions of the records that are kept, and of `count` that are held out.

  By class, every class gives the same share of its records as far as whole ones go, drawn by the seed, and
  keeps at least one where no more than half are held out.

  Args:
    labels: `[records]`.
    count: records that are held out.
    order: see `Order`.
    seed: of the draw.

  Raises:
    ValueError: for the last records of a list in the order of its classes: most would be of classes that the
      kept ones lack.
  """
  labels = np.asarray(labels)
  if order == 'last':
    kept, held = np.split(np.arange(len(labels)), [len(labels) - count])
    strange = np.mean(~np.isin(labels[held], labels[kept]))
    if strange > 0.5:
      raise ValueError(
        f'held_out={count}: {100 * strange:.0f} % of the last records are of classes that are not among the '
        "others, the records are in the order of their classes; expected held_out_order='by_class'."
      )
    return kept, held
  drawn = np.random.default_rng(seed).permutation(len(labels))
  place = np.empty(len(labels))
  for label in np.unique(labels):
    own = drawn[labels[drawn] == label]
    place[own] = (np.arange(len(own)) + 0.5) / len(own)
  # The draw decides between equal places.
  ranked = drawn[np.argsort(place[drawn], kind='stable')]
  kept, held = np.split(ranked, [len(labels) - count])
  return np.sort(kept), np.sort(held)
