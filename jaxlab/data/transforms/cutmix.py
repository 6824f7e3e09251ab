"""CutMix: a rectangle of each image is another image's."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.data.transforms.mixup import Partners, take_partners


def cutmix(
  key: jax.Array,
  images: ArrayLike,
  alpha: float = 1.0,
  *,
  own_half: bool = False,
  partners: Partners = 'permutation',
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Pastes a rectangle of each image's partner into it, at the same place in all images.

  One share `lam ~ Beta(alpha, alpha)`, one permutation and one box with a uniform center for the
  whole batch, see `cutmix_box`.

  Args:
    key: of the draws.
    images: `[batch, height, width, channels]`.
    alpha: of the Beta distribution, not negative; a Python number. With 0 the images stay, share 1.
    own_half: takes `max(lam, 1 - lam)`, so that every image keeps at least half of itself.
    partners: see `mixup`.

  Returns:
    The images, the permutation int32 `[batch]`, and the share of its own area that an image kept, a float32
    scalar; `mixup_loss` takes the latter two.

  Raises:
    ValueError: if `alpha` is negative, for images of another rank, or other partners.

  References:
    Yun et al., CutMix, ICCV 2019 (https://arxiv.org/abs/1905.04899); `own_half` and the rounding of the box
    as in the code of Cao et al., Training Vision Transformers with Only 2040 Images, ECCV 2022.

  >>> images = jnp.stack([jnp.zeros((4, 4, 1)), jnp.ones((4, 4, 1))])
  >>> mixed, permutation, share = cutmix(jax.random.key(1), images)
  >>> bool(jnp.allclose(mixed[0].mean(), (1 - share) * permutation[0]))
  True
  """
  images = jnp.asarray(images)
  if images.ndim != 4:
    raise ValueError(f'images must be [batch, height, width, channels], got {images.shape}.')
  if not alpha >= 0:
    raise ValueError(f'alpha must not be negative, got {alpha}.')
  share_key, order_key, *center_keys = jax.random.split(key, 4)
  drawn = jax.random.beta(share_key, alpha, alpha, dtype=jnp.float32) if alpha else 1
  lam = jnp.float32(drawn)
  lam = jnp.maximum(lam, 1 - lam) if own_half else lam
  others, permutation = take_partners(order_key, images, partners)
  size = images.shape[1:3]
  center = [jax.random.randint(k, (), 0, side) for k, side in zip(center_keys, size)]
  box, share = cutmix_box(lam, jnp.stack(center), size)
  return paste_box(images, others, box), permutation, share


def cutmix_box(
  lam: ArrayLike, center: ArrayLike, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
  """Returns the box of `1 - lam` of an image's area around a center, cut at the borders.

  Sides are `int(side sqrt(1 - lam))`; the box reaches from `center - side // 2` to `center + side // 2`, so
  that an odd side loses a pixel.

  Args:
    lam: share that is kept, in [0, 1].
    center: int `[2]`, row and column.
    size: height and width of the image, static.

  Returns:
    int32 `[4]`, `[top, left, height, width]`, and the share that is kept indeed, float32 or wider.
  """
  lam = jnp.asarray(lam, jnp.promote_types(jnp.result_type(lam), jnp.float32))
  whole = jnp.array(size)
  half = (whole * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
  first = jnp.clip(center - half, 0, whole)
  sides = jnp.clip(center + half, 0, whole) - first
  share = 1 - jnp.prod(sides) / lam.dtype.type(math.prod(size))
  return jnp.concatenate([first, sides]).astype(jnp.int32), share


def paste_box(images: ArrayLike, others: ArrayLike, box: ArrayLike) -> jax.Array:
  """Returns `images` with what `others` show within the box.

  Args:
    images: `[batch, height, width, channels]`.
    others: of the same shape and dtype.
    box: `[top, left, height, width]`; may be traced.
  """
  images = jnp.asarray(images)
  top, left, height, width = jnp.asarray(box)
  rows, columns = jnp.arange(images.shape[1]), jnp.arange(images.shape[2])
  inside = ((rows >= top) & (rows < top + height))[:, None]
  inside &= (columns >= left) & (columns < left + width)
  return jnp.where(inside[..., None], others, images)
