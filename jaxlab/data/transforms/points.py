"""Augmentations of clouds of points `[points, 3]`: pure functions `(key, points) -> points`."""

import jax
import jax.numpy as jnp

Array = jax.Array


def random_point_dropout(key: Array, points: Array, max_share: float = 0.875) -> Array:
  """Returns a cloud in which a random share of the points, up to `max_share`, lies where the first one does.

  The number of points stays, and nothing is said of the dropped ones: the maximum over points is the same as
  without them.

  Raises:
    ValueError: for a share outside of [0, 1].
  """
  if not 0 <= max_share <= 1:
    raise ValueError(f'max_share is {max_share}, expected a share in [0, 1].')
  share_key, drop_key = jax.random.split(key)
  share = jax.random.uniform(share_key, (), points.dtype, 0, max_share)
  dropped = jax.random.uniform(drop_key, points.shape[:1]) <= share
  return jnp.where(dropped[:, None], points[0], points)


def random_scale_shift(
  key: Array, points: Array, scale: tuple[float, float] = (0.8, 1.25), shift: float = 0.1
) -> Array:
  """Returns a cloud times a random factor of `scale`, moved by up to `shift` along each axis.

  Raises:
    ValueError: for a range of factors that is empty or not positive, or a negative shift.
  """
  if not 0 < scale[0] <= scale[1] or shift < 0:
    raise ValueError(
      f'scale={scale}, shift={shift}: expected a range of positive factors and a distance.'
    )
  scale_key, shift_key = jax.random.split(key)
  factor = jax.random.uniform(scale_key, (), points.dtype, *scale)
  return points * factor + jax.random.uniform(
    shift_key, points.shape[-1:], points.dtype, -shift, shift
  )
