"""Loss of detail: an image is made smaller, and brought back to its size."""

import jax
import jax.numpy as jnp

from jaxlab.data.transforms.crop import crop_and_resize, cubic
from jaxlab.data.transforms.image import apply_separable, check_image


def random_rescale(key: jax.Array, image: jax.Array, low: int) -> jax.Array:
  """Returns a square image made smaller, to a random side from `low` to its own, and as large as before.

  Both ways bicubic, with antialias, as faces of low resolution are enlarged (DLDL-v2's augmentation).

  Args:
    key: a typed PRNG key.
    image: floats `[side, side, channels]` in [0, 1].
    low: smallest side.

  Raises:
    ValueError: for images that are not square, or `low` outside of 1 to their side.
  """
  check_image(image)
  side = image.shape[0]
  if image.shape[1] != side or not 1 <= low <= side:
    raise ValueError(
      f'image {image.shape}, low={low}: expected a square and a side of at most its own.'
    )
  small = jax.random.randint(key, (), low, side + 1).astype(jnp.float32)
  # The reduced image lies in the first `small` rows and columns of the canvas; the others hold zeros.
  pixel, step = jnp.arange(side, dtype=jnp.float32), side / small
  weights = cubic(jnp.abs(pixel + 0.5 - step * (pixel[:, None] + 0.5)) / step, -0.5)
  total = jnp.sum(weights, axis=1, keepdims=True)
  inside = pixel[:, None] < small
  weights = jnp.where(inside, weights / jnp.where(inside, total, 1), 0)
  reduced = jnp.clip(apply_separable(image, weights, weights), 0, 1)
  box = jnp.stack([jnp.float32(0), jnp.float32(0), small, small])
  return crop_and_resize(reduced, box, side, interpolation='bicubic')
