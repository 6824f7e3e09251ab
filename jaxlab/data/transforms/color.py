"""On-device color augmentation: torchvision's color jitter, and contrast with brightness."""

import dm_pix
import jax
import jax.numpy as jnp

from jaxlab.data.transforms.image import check_image, luma

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def random_color_jitter(
  key: jax.Array,
  image: jax.Array,
  brightness: float = 0.4,
  contrast: float = 0.4,
  saturation: float = 0.4,
  hue: float = 0.1,
) -> jax.Array:
  """Returns the image after torchvision's `ColorJitter`: four adjustments in random order.

  Args:
    key: a typed key.
    image: floats in [0, 1], `[height, width, 1 or 3]`; of a gray image only brightness and contrast
      change.
    brightness: factor ~ U(max(0, 1 - brightness), 1 + brightness); so for the next two.
    contrast: see above.
    saturation: see above.
    hue: shift ~ U(-hue, hue) in turns, 0 <= hue <= 0.5; 0 saves the conversion to HSV.

  The defaults are SSQL's, MoCo v2's and SimSiam's (with probability 0.8).
  """
  return jitter_colors(image, **draw_color_jitter(key, brightness, contrast, saturation, hue))


def draw_color_jitter(
  key: jax.Array, brightness: float, contrast: float, saturation: float, hue: float
) -> dict[str, jax.Array | None]:
  """Returns the random arguments of `jitter_colors`, drawn by torchvision's rule."""
  for name, value in (
    ('brightness', brightness),
    ('contrast', contrast),
    ('saturation', saturation),
  ):
    if value < 0:
      raise ValueError(f'{name} is {value}, expected a number >= 0.')
  if not 0 <= hue <= 0.5:
    raise ValueError(f'hue is {hue}, expected a number in [0, 0.5] (turns).')
  order_key, value_key = jax.random.split(key)
  strengths = jnp.array([brightness, contrast, saturation, hue])
  center = jnp.array([1.0, 1.0, 1.0, 0.0])
  lowest = jnp.array([0.0, 0.0, 0.0, -0.5])
  values = jax.random.uniform(
    value_key, (4,), minval=jnp.maximum(center - strengths, lowest), maxval=center + strengths
  )
  return {
    'order': jax.random.permutation(order_key, 4),
    'brightness': values[BRIGHTNESS],
    'contrast': values[CONTRAST],
    'saturation': values[SATURATION],
    'hue': values[HUE] if hue else None,
  }


def shift_hue(image: jax.Array, shift: jax.Array | float) -> jax.Array:
  """Returns the RGB image `[..., 3]` with `shift` turns added to its hue in HSV; gray stays gray.

  The hue is found by comparisons of channels, not (as in dm_pix) by which one equals the largest: where a
  compiler computes a channel twice, once with fused multiply-adds, none may.
  """
  red, green, blue = jnp.moveaxis(image, -1, 0)
  value, low = jnp.max(image, -1), jnp.min(image, -1)
  chroma = value - low
  divisor = jnp.where(chroma > 0, chroma, 1)
  sector = jnp.where(
    (red >= green) & (red >= blue),
    (green - blue) / divisor,
    jnp.where(green >= blue, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
  )
  saturation = jnp.where(value > 0, chroma / jnp.where(value > 0, value, 1), 0)
  return dm_pix.hsv_to_rgb(jnp.stack([(sector / 6 + shift) % 1, saturation, value], -1))


def jitter_colors(
  image: jax.Array,
  order: jax.Array,
  brightness: jax.Array | float,
  contrast: jax.Array | float,
  saturation: jax.Array | float,
  hue: jax.Array | float | None,
) -> jax.Array:
  """Returns the image after the four adjustments in the given order, as torchvision defines them.

  Brightness, contrast and saturation blend with a target, `clip(f x + (1 - f) target, 0, 1)`: black,
  the mean luma of the image, the luma of the pixel. Hue is shifted in HSV, modulo one turn.

  Args:
    image: floats in [0, 1], `[height, width, 1 or 3]`.
    order: int `[4]`, a permutation of (0: brightness, 1: contrast, 2: saturation, 3: hue).
    brightness: factor; 1 changes nothing.
    contrast: factor.
    saturation: factor; ignored for gray images.
    hue: shift in [-0.5, 0.5] turns, or None; ignored for gray images.

  Under `vmap` a choice between four adjustments computes all of them, sixteen in four places. So hue,
  which costs most, is computed once, between the blends that come before it and those that come after
  it; blends in the wrong place get the factor 1, which is the identity.
  """
  check_image(image)
  gray = image.shape[-1] == 1
  factors = jnp.stack(
    [jnp.asarray(f, jnp.float32) for f in (brightness, contrast, 1.0 if gray else saturation, 1.0)]
  ).astype(image.dtype)

  def blend(image: jax.Array, place: int, active: jax.Array | bool) -> jax.Array:
    operation = order[place]
    factor = jnp.where(active, factors[operation], jnp.ones((), image.dtype))
    pixel = luma(image)
    mean = jnp.mean(pixel, dtype=jnp.promote_types(image.dtype, jnp.float32)).astype(image.dtype)
    target = jnp.where(operation == CONTRAST, mean, pixel)
    target = jnp.where(operation == BRIGHTNESS, jnp.zeros((), image.dtype), target)
    return jnp.clip(factor * image + (1 - factor) * target, 0, 1)

  if hue is None or gray:
    for place in range(4):
      image = blend(image, place, True)
    return image
  hue_place = jnp.argmax(order == HUE)
  for place in range(3):
    image = blend(image, place, place < hue_place)
  image = shift_hue(image, jnp.asarray(hue, image.dtype))
  for place in range(1, 4):
    image = blend(image, place, place > hue_place)
  return image


def random_contrast_brightness(
  key: jax.Array,
  image: jax.Array,
  contrast: tuple[float, float] = (0.6, 1.4),
  brightness: tuple[float, float] = (-0.4, 0.4),
) -> jax.Array:
  """Returns `c * image + b` with c ~ U(contrast), b ~ U(brightness); nothing is clipped.

  For *normalized* images, whose mean is near 0: there the product is a change of contrast.
  """
  check_image(image)
  for name, (low, high) in (('contrast', contrast), ('brightness', brightness)):
    if low > high:
      raise ValueError(f'{name} is {(low, high)}, expected low <= high.')
  uniform = jax.random.uniform(key, (2,), jnp.promote_types(image.dtype, jnp.float32))
  scale = contrast[0] + (contrast[1] - contrast[0]) * uniform[0]
  shift = brightness[0] + (brightness[1] - brightness[0]) * uniform[1]
  return image * scale.astype(image.dtype) + shift.astype(image.dtype)
