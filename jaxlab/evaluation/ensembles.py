"""Ensembles of classifiers, from the probabilities of their members."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Ensemble(NamedTuple):
  """What an ensemble says.

  Attributes:
    probabilities: float64 `[..., num_classes]`.
    predictions: the most probable classes, int64 `[...]`; of equal ones the first.
  """

  probabilities: np.ndarray
  predictions: np.ndarray


def ensemble(member_probabilities: ArrayLike) -> Ensemble:
  """Mean of the members' probabilities, `1 / M sum_m p_m`; host code, in float64.

  Args:
    member_probabilities: `[members, ..., num_classes]`, in [0, 1].

  Raises:
    ValueError: if there is no member, or numbers are no probabilities (logits, percent, NaN).

  References:
    Fu et al., Worst Case Matters for Few-Shot Recognition, ECCV 2022, https://arxiv.org/abs/2203.06574.

  >>> found = ensemble([[0.6, 0.4], [0.1, 0.9]])
  >>> found.probabilities.round(2).tolist(), int(found.predictions)
  ([0.35, 0.65], 1)
  """
  values = np.asarray(member_probabilities, np.float64)
  if values.ndim < 2 or not values.size:
    raise ValueError(
      f'member_probabilities have shape {values.shape}, expected [members, ..., num_classes], not empty.'
    )
  # A softmax in float32 may pass 1 by its last bits.
  if not np.all((values >= 0) & (values <= 1 + 1e-6)):
    raise ValueError(
      f'member_probabilities run from {values.min()} to {values.max()}, expected probabilities in [0, 1].'
    )
  mean = np.mean(values, axis=0)
  return Ensemble(mean, np.argmax(mean, -1))
