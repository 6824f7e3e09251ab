"""What the losses and metrics of classifiers check of labels and counts, and how they index by labels."""

from __future__ import annotations

import jax
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


def require_multi_labels(**labels: ArrayLike) -> None:
  """Raises ValueError if a named array, where it is concrete, holds other values than 0 and 1."""
  for name, values in labels.items():
    if is_concrete(values):
      values = np.asarray(values)
      if wrong := np.argwhere((values != 0) & (values != 1)).tolist():
        raise ValueError(f'{name} must be 0 or 1 for each class; at {wrong[0]} it is not.')


def wide(labels: ArrayLike) -> jax.Array:
  """Returns labels in at least int32: 1000 classes cannot be compared with uint8 labels."""
  return jnp.asarray(labels).astype(jnp.promote_types(jnp.result_type(labels), jnp.int32))


def one_or_nan(labels: ArrayLike, num_classes: int, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Returns 1 for labels in [0, num_classes) and NaN for others, `[...]`: a factor of what they give.

  Under `jit` a label cannot raise, and an index out of range would count from the end or be clipped.
  """
  labels = wide(labels)
  return jnp.where((labels >= 0) & (labels < num_classes), 1, jnp.nan).astype(dtype)


def at_labels(values: jax.Array, labels: ArrayLike) -> jax.Array:
  """Returns `values[..., label]`, `[...]`, NaN for labels out of range.

  Args:
    values: floats, `[..., num_classes]` with the axes of `labels` in front, or `[num_classes]` for all.
    labels: integers, `[...]`.
  """
  labels, num_classes = wide(labels), values.shape[-1]
  inside = jnp.clip(labels, 0, num_classes - 1)
  if values.ndim == 1:
    found = values[inside]
  else:
    found = jnp.take_along_axis(values, inside[..., None], axis=-1)[..., 0]
  return found * one_or_nan(labels, num_classes, values.dtype)


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
