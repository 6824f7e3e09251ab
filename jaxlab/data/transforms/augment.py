"""On-device augmentation: combinators, keys, flip and blur.

An augmentation is a pure function `(key, image) -> image` of one float image `[height, width,
channels]` in [0, 1] with static output shape. Options are bound with `functools.partial`, functions are
chained with `compose`, and a batch is `jax.vmap(augment)(example_keys(key, step, index), images)`.
"""

import functools
from collections.abc import Callable

import dm_pix
import jax
import jax.numpy as jnp

from jaxlab.data.transforms.image import apply_separable, check_image, luma

Augment = Callable[[jax.Array, jax.Array], jax.Array]


def example_keys(key: jax.Array, step: jax.Array | int, index: jax.Array) -> jax.Array:
  """Returns one key per example, `fold_in(fold_in(key, step), index)`.

  What an example draws thus depends on the run's key, the step and the record alone: not on its place
  in the batch, on the number of devices, or on what was drawn before a restart.

  Args:
    key: a typed key, `jax.random.key(seed)`.
    step: the number of finished steps.
    index: int `[batch]`, the records' positions in their source.

  Returns:
    Typed keys `[batch]`.
  """
  return jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, step)))(index)


def compose(*augments: Augment) -> Augment:
  """Returns the augmentation that applies `augments` in turn, each with its own key."""
  if not augments:
    raise ValueError('compose() needs at least one augmentation.')

  def composed(key: jax.Array, image: jax.Array) -> jax.Array:
    for augment, sub_key in zip(augments, jax.random.split(key, len(augments))):
      image = augment(sub_key, image)
    return image

  return composed


def deterministic(function: Callable[..., jax.Array], *args, **kwargs) -> Augment:
  """Returns `(key, image) -> function(image, *args, **kwargs)`, to put it into `compose`.

  >>> invert = deterministic(lambda image: 1 - image)
  >>> compose(invert, invert)(jax.random.key(0), jnp.ones((1, 1, 1))).item()
  1.0
  """

  def keyless(key: jax.Array, image: jax.Array) -> jax.Array:
    del key
    return function(image, *args, **kwargs)

  return keyless


def random_apply(probability: float, augment: Augment) -> Augment:
  """Returns the augmentation that applies `augment` with `probability`, else returns the image.

  Both outcomes are computed (under `vmap` a branch is a selection), so `augment` keeps shape and dtype.
  """
  if not 0 <= probability <= 1:
    raise ValueError(f'probability is {probability}, expected a number in [0, 1].')

  def applied(key: jax.Array, image: jax.Array) -> jax.Array:
    coin_key, augment_key = jax.random.split(key)
    augmented = augment(augment_key, image)
    if augmented.shape != image.shape or augmented.dtype != image.dtype:
      raise ValueError(
        f'random_apply needs an augmentation that keeps shape and dtype; it turned {image.dtype}'
        f'{image.shape} into {augmented.dtype}{augmented.shape}.'
      )
    return jnp.where(jax.random.bernoulli(coin_key, probability), augmented, image)

  return applied


def random_flip(key: jax.Array, image: jax.Array, probability: float = 0.5) -> jax.Array:
  """Returns the image mirrored left to right with `probability`."""
  check_image(image, floating=False)
  return dm_pix.random_flip_left_right(key, image, probability=probability)


def grayscale(image: jax.Array) -> jax.Array:
  """Returns the image with each channel replaced by its luma (`image.luma`); gray ones unchanged."""
  check_image(image)
  return jnp.broadcast_to(luma(image), image.shape).astype(image.dtype)


def random_grayscale(key: jax.Array, image: jax.Array, probability: float = 0.2) -> jax.Array:
  """Returns `grayscale(image)` with `probability` (0.2: SimCLR, Chen et al. 2020), else the image."""
  return random_apply(probability, deterministic(grayscale))(key, image)


def solarize(image: jax.Array, threshold: float = 0.5) -> jax.Array:
  """Returns `1 - x` where `x >= threshold`, else `x` (torchvision's rule; 0.5 as in BYOL)."""
  check_image(image)
  return dm_pix.solarize(image, threshold)


def random_solarize(
  key: jax.Array, image: jax.Array, probability: float = 0.2, threshold: float = 0.5
) -> jax.Array:
  """Returns `solarize(image, threshold)` with `probability`, else the image."""
  return random_apply(probability, deterministic(solarize, threshold))(key, image)


def random_rotation(key: jax.Array, image: jax.Array, limit: float) -> jax.Array:
  """Returns the image turned around its center by an angle ~ U(-limit, limit), in radians.

  Pixels are mixed bilinearly; beyond the border the nearest one is seen.
  """
  check_image(image)
  if limit < 0:
    raise ValueError(f'limit is {limit}, expected an angle of at least 0.')
  angle = jax.random.uniform(key, (), minval=-limit, maxval=limit)
  return dm_pix.rotate(image, angle).astype(image.dtype)


def random_noise(key: jax.Array, image: jax.Array, std: float) -> jax.Array:
  """Returns the image plus Gaussian noise of deviation `std`, which may leave [0, 1]."""
  check_image(image)
  if std < 0:
    raise ValueError(f'std is {std}, expected at least 0.')
  return image + std * jax.random.normal(key, image.shape, image.dtype)


def gaussian_blur(image: jax.Array, sigma: jax.Array | float, kernel_size: int) -> jax.Array:
  """Returns the image filtered by a Gaussian of `kernel_size` taps and reflected borders.

  Taps `exp(-d^2 / (2 sigma^2))` at the integers |d| <= kernel_size // 2, normalized to sum 1, as
  torchvision's `gaussian_blur`. Each axis is one product with a banded matrix, which holds the
  reflection too: under `vmap` every example has its own sigma, for which a convolution would be a
  grouped one.

  Args:
    image: floats `[height, width, channels]`.
    sigma: standard deviation in pixels, positive; may be traced.
    kernel_size: odd and static; its half must be smaller than height and width.
  """
  check_image(image)
  if kernel_size < 1 or kernel_size % 2 == 0:
    raise ValueError(f'kernel_size is {kernel_size}, expected a positive odd number.')
  radius = kernel_size // 2
  if radius >= min(image.shape[:2]):
    raise ValueError(
      f'kernel_size {kernel_size} needs an image of more than {radius} pixels a side to reflect at '
      f'its borders, got shape {image.shape}; use a smaller kernel.'
    )
  sigma = jnp.asarray(sigma, jnp.promote_types(image.dtype, jnp.float32))

  def band(size: int) -> jax.Array:
    out, source = jnp.arange(size)[:, None], jnp.arange(size)[None, :]

    def tap(distance: jax.Array) -> jax.Array:
      weight = jnp.exp(-0.5 * jnp.square(distance / sigma))
      return jnp.where(jnp.abs(distance) <= radius, weight, 0)

    # A source pixel is seen directly and as its mirror image beyond either border (the border pixel
    # itself is not repeated).
    matrix = tap(source - out)
    matrix += jnp.where(source > 0, tap(source + out), 0)
    matrix += jnp.where(source < size - 1, tap(2 * (size - 1) - source - out), 0)
    return matrix / jnp.sum(tap(jnp.arange(-radius, radius + 1)))

  return apply_separable(image, band(image.shape[0]), band(image.shape[1]))


def random_gaussian_blur(
  key: jax.Array,
  image: jax.Array,
  sigma: tuple[float, float] = (0.1, 2.0),
  kernel_size: int = 23,
) -> jax.Array:
  """Returns `gaussian_blur` with sigma ~ U(sigma).

  The default range is SimCLR's (Chen et al. 2020), as is the kernel of 23 taps for 224-pixel images
  (a tenth of the side).
  """
  low, high = sigma
  if not 0 < low <= high:
    raise ValueError(f'sigma is {sigma}, expected 0 < low <= high.')
  return gaussian_blur(image, jax.random.uniform(key, minval=low, maxval=high), kernel_size)
