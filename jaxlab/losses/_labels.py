"""What the losses and metrics of classifiers check of labels and class counts."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlab.tracing import is_concrete


def require_labels(logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None) -> None:
  """Raises ValueError unless `labels` are classes of `logits`, `[..., num_classes]`, and `mask` fits."""
  shape, label_shape = jnp.shape(logits), jnp.shape(labels)
  if not shape or shape[:-1] != label_shape or 0 in shape:
    raise ValueError(
      f'Expected logits [..., num_classes] and labels [...], not empty; got {shape}, {label_shape}.'
    )
  if mask is not None and jnp.shape(mask) != label_shape:
    raise ValueError(f'mask must be {label_shape} like labels, got {jnp.shape(mask)}.')
  require_classes(labels, shape[-1], mask)


def require_classes(
  labels: ArrayLike, num_classes: int, mask: ArrayLike | None = None, name: str = 'labels'
) -> None:
  """Raises ValueError unless `labels` are integers; if concrete, unless all (unmasked) are in range."""
  if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
    raise ValueError(f'{name} must be integers, got {jnp.result_type(labels)}.')
  if is_concrete(labels) and (mask is None or is_concrete(mask)):
    values = np.asarray(labels) if mask is None else np.asarray(labels)[np.asarray(mask, bool)]
    if values.size and not 0 <= values.min() <= values.max() < num_classes:
      raise ValueError(
        f'{name} must be in [0, {num_classes}), got values from {values.min()} to {values.max()}.'
      )


def require_class_counts(class_counts: ArrayLike, num_classes: int | None = None) -> None:
  """Raises ValueError unless `class_counts` is `[num_classes]`; if concrete, of positive integers."""
  shape = jnp.shape(class_counts)
  if len(shape) != 1 or not shape[0] or num_classes not in (None, shape[0]):
    expected = '[num_classes]' if num_classes is None else f'[{num_classes}] like the logits'
    raise ValueError(f'class_counts must be {expected}, got {shape}.')
  if is_concrete(class_counts):
    counts = np.asarray(class_counts, np.float64)
    wrong = np.flatnonzero(~((counts > 0) & (counts == np.round(counts)) & np.isfinite(counts)))
    if wrong.size:
      raise ValueError(
        f'class_counts must be positive integers, got {counts[wrong[0]]:g} for class {wrong[0]}: '
        'leave out classes without training examples and number the others anew.'
      )
