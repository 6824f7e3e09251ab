"""On-device geometry: crops, random resized crops, erased rectangles.

A box is int32 `[top, left, height, width]` in pixels. What is drawn and what is done are apart:
`draw_*` turns a key into boxes, `crop_and_resize` and `erase` apply them.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.data.transforms.image import apply_separable, check_image
from jaxlab.tracing import is_concrete

Size = int | tuple[int, int]
Interpolation = Literal['bilinear', 'bicubic']
TRIES = 10  # torchvision's, for random resized crops and random erasing


def random_resized_crop(
  key: jax.Array,
  image: jax.Array,
  size: Size,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  antialias: bool = True,
  interpolation: Interpolation = 'bilinear',
) -> jax.Array:
  """Returns a random part of the image, resized to `size`: torchvision's rule.

  Args:
    key: a typed key.
    image: floats `[height, width, channels]`.
    size: static output side, or (height, width).
    scale: range of the part's share of the area.
    ratio: range of width / height, log-uniform.
    antialias: see `crop_and_resize`.
    interpolation: see `crop_and_resize`.

  The defaults are those of "Going deeper with convolutions" (Szegedy et al. 2015) and torchvision.
  """
  check_image(image)
  size = _pair('size', size)
  box = draw_resized_crop(key, image.shape[0], image.shape[1], scale, ratio)
  return crop_and_resize(image, box, size, antialias, interpolation)


def draw_resized_crop(
  key: jax.Array, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> jax.Array:
  """Returns a box int32 `[4]` drawn by the rule of torchvision's `RandomResizedCrop`.

  Area ~ U(scale) * height * width and log(ratio) ~ U(log ratio) give the rounded sides; the first of
  ten tries that fits is placed uniformly. If none fits: the largest centered box whose ratio is
  clamped to the range. Reads `jax.random.uniform(key, (40,))`: ten
  each for area, ratio, top, left.
  """
  areas, ratios, tops, lefts = _draw_tries(key, height * width, scale, ratio)
  widths = jnp.round(jnp.sqrt(areas * ratios)).astype(jnp.int32)
  heights = jnp.round(jnp.sqrt(areas / ratios)).astype(jnp.int32)
  fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
  tries = jnp.stack(
    [_place(tops, height - heights), _place(lefts, width - widths), heights, widths], axis=-1
  )
  fallback_height, fallback_width = height, width
  if width / height < ratio[0]:
    fallback_height = max(1, round(width / ratio[0]))
  elif width / height > ratio[1]:
    fallback_width = max(1, round(height * ratio[1]))
  fallback = jnp.array(
    [
      (height - fallback_height) // 2,
      (width - fallback_width) // 2,
      fallback_height,
      fallback_width,
    ],
    jnp.int32,
  )
  return jnp.where(jnp.any(fits), tries[jnp.argmax(fits)], fallback)


def crop_and_resize(
  image: jax.Array,
  box: jax.Array,
  size: Size,
  antialias: bool = True,
  interpolation: Interpolation = 'bilinear',
) -> jax.Array:
  """Returns the part of the image in `box`, resized to `size`.

  The part is cut out first, so that nothing outside the box is seen. With `antialias` the filter widens
  with the reduction, as in PIL and in torchvision's default; without, two pixels a side are mixed, as in
  torch's `interpolate`. Enlarging is the same in both.

  Args:
    image: floats `[height, width, channels]`.
    box: `[4]`, of at least a pixel, inside of the image. It may be traced: its values are not looked at then,
      and pixels of which it holds none of the image are NaN.
    size: static output side, or (height, width).
    antialias: whether to widen the filter when the part is made smaller.
    interpolation: `'bilinear'`, or `'bicubic'`: the cubic with a = -1/2, its overshoot clipped to [0, 1],
      as in PIL. Torch's without antialias has another a and is not here.

  Returns:
    `[out_height, out_width, channels]` in the image's dtype.

  Raises:
    ValueError: for another interpolation, or bicubic without antialias; for a box that is concrete, and
      empty or not within the image.
  """
  check_image(image)
  if interpolation not in Interpolation.__args__:
    raise ValueError(
      f'interpolation is {interpolation!r}, expected one of {Interpolation.__args__}.'
    )
  if interpolation == 'bicubic' and not antialias:
    raise ValueError("interpolation='bicubic' takes antialias=True.")
  _check_box(box, image.shape)
  out_height, out_width = _pair('size', size)
  dtype = jnp.promote_types(image.dtype, jnp.float32)
  top, left, height, width = jnp.asarray(box, dtype)
  bicubic = interpolation == 'bicubic'
  rows = _resize_matrix(image.shape[0], top, height, out_height, antialias, bicubic)
  columns = _resize_matrix(image.shape[1], left, width, out_width, antialias, bicubic)
  resized = apply_separable(image, rows, columns)
  return jnp.clip(resized, 0, 1) if bicubic else resized


def _resize_matrix(
  size: int, start: jax.Array, length: jax.Array, out_size: int, antialias: bool, bicubic: bool
) -> jax.Array:
  """Returns the weights `[out_size, size]` that resize `[start, start + length)` to `out_size`."""
  pixel = jnp.arange(size, dtype=start.dtype)
  step = length / out_size
  center = start + step * (jnp.arange(out_size, dtype=start.dtype) + 0.5)
  support = jnp.maximum(step, 1) if antialias else 1
  distance = jnp.abs(pixel + 0.5 - center[:, None]) / support
  weights = cubic(distance, -0.5) if bicubic else jnp.maximum(1 - distance, 0)
  weights = jnp.where((pixel >= start) & (pixel < start + length), weights, 0)
  return weights / jnp.sum(weights, axis=1, keepdims=True)


def cubic(distance: jax.Array, a: float) -> jax.Array:
  """Returns the weight of a pixel at `distance` >= 0 in cubic convolution (Keys 1981) with slope `a`."""
  near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
  far = ((distance - 5) * distance + 8) * distance * a - 4 * a
  return jnp.where(distance < 1, near, jnp.where(distance < 2, far, 0))


def center_crop(image: jax.Array, size: Size) -> jax.Array:
  """Returns the central part `[height, width, channels]` of `size`; offsets round as torchvision's."""
  check_image(image, floating=False)
  height, width = _pair('size', size)
  _check_fits((height, width), image.shape)
  top = round((image.shape[0] - height) / 2)
  left = round((image.shape[1] - width) / 2)
  return image[top : top + height, left : left + width]


def random_crop(
  key: jax.Array,
  image: jax.Array,
  size: Size | None = None,
  padding: int = 4,
  mode: str = 'constant',
) -> jax.Array:
  """Returns a part of `size` at a uniform place of the image padded by `padding` on each side.

  Args:
    key: a typed key.
    image: `[height, width, channels]`.
    size: static output side, or (height, width); default: the image's own, the pad-crop of CIFAR
      (pad 4; He et al. 2016).
    padding: pixels added on each side.
    mode: 'constant' (zeros) or 'reflect', as in `jnp.pad`.
  """
  check_image(image, floating=False)
  height, width = image.shape[:2] if size is None else _pair('size', size)
  if padding < 0:
    raise ValueError(f'padding is {padding}, expected a number >= 0.')
  padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode=mode)
  _check_fits((height, width), padded.shape)
  limits = jnp.array([padded.shape[0] - height, padded.shape[1] - width])
  top, left = jax.random.randint(key, (2,), 0, limits + 1)
  return jax.lax.dynamic_slice(padded, (top, left, 0), (height, width, image.shape[2]))


def random_erasing(
  key: jax.Array,
  image: jax.Array,
  probability: float = 0.5,
  scale: tuple[float, float] = (0.02, 0.33),
  ratio: tuple[float, float] = (0.3, 3.3),
  value: float | None = 0.0,
) -> jax.Array:
  """Returns the image with a random rectangle erased with `probability`: torchvision's rule.

  Args:
    key: a typed key.
    image: floats `[height, width, channels]`.
    probability: of erasing at all.
    scale: range of the rectangle's share of the area.
    ratio: range of height / width, log-uniform.
    value: what replaces the pixels; None: standard normal noise, one draw a pixel and channel (for
      normalized images).

  Defaults: Zhong et al. 2020 as in torchvision.
  """
  check_image(image)
  if not 0 <= probability <= 1:
    raise ValueError(f'probability is {probability}, expected a number in [0, 1].')
  coin_key, box_key, noise_key = jax.random.split(key, 3)
  box = draw_erasing(box_key, image.shape[0], image.shape[1], scale, ratio)
  fill = jax.random.normal(noise_key, image.shape, image.dtype) if value is None else value
  return jnp.where(jax.random.bernoulli(coin_key, probability), erase(image, box, fill), image)


def draw_erasing(
  key: jax.Array, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> jax.Array:
  """Returns a box int32 `[4]` by the rule of torchvision's `RandomErasing`; of no height if none fits.

  As `draw_resized_crop`, but the ratio is height / width, both sides must be smaller than the image's,
  and when ten tries fail nothing is erased. Reads `jax.random.uniform(key, (40,))`.
  """
  areas, ratios, tops, lefts = _draw_tries(key, height * width, scale, ratio)
  heights = jnp.round(jnp.sqrt(areas * ratios)).astype(jnp.int32)
  widths = jnp.round(jnp.sqrt(areas / ratios)).astype(jnp.int32)
  fits = (heights < height) & (widths < width)
  tries = jnp.stack(
    [_place(tops, height - heights), _place(lefts, width - widths), heights, widths], axis=-1
  )
  return jnp.where(jnp.any(fits), tries[jnp.argmax(fits)], jnp.zeros(4, jnp.int32))


def random_cutout(key: jax.Array, image: jax.Array, side: int, value: float = 0.0) -> jax.Array:
  """Returns the image with a square erased whose center is uniform over the pixels.

  The square is cut off at the borders (DeVries & Taylor 2017).

  Args:
    key: a typed key.
    image: floats `[height, width, channels]`.
    side: of the square, in pixels; 16 on CIFAR-10, 8 on CIFAR-100.
    value: what replaces the pixels.
  """
  check_image(image)
  if not 0 < side <= 2 * max(image.shape[:2]):
    raise ValueError(f'side is {side}, expected 1 to {2 * max(image.shape[:2])} pixels.')
  center = jax.random.randint(key, (2,), 0, jnp.array(image.shape[:2]))
  return erase(image, jnp.concatenate([center - side // 2, jnp.array([side, side])]), value)


def erase(image: jax.Array, box: jax.Array, value: jax.Array | float) -> jax.Array:
  """Returns the image with `value` (scalar or an image) in `box`, which may reach over the borders."""
  top, left, height, width = box
  row = jnp.arange(image.shape[0])[:, None, None]
  column = jnp.arange(image.shape[1])[None, :, None]
  inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
  return jnp.where(inside, jnp.asarray(value, image.dtype), image)


def _draw_tries(
  key: jax.Array, area: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns ten areas, ten ratios, and ten uniform numbers each for top and left."""
  _check_range('scale', scale)
  _check_range('ratio', ratio)
  # One flat draw: XLA takes five times as long to compile the shape (4, 10).
  areas, log_ratios, tops, lefts = jnp.split(jax.random.uniform(key, (4 * TRIES,)), 4)
  areas = area * (scale[0] + (scale[1] - scale[0]) * areas)
  ratios = jnp.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * log_ratios)
  return areas, ratios, tops, lefts


def _place(uniform: jax.Array, last: jax.Array) -> jax.Array:
  """Returns integers uniform over 0 .. last; float32 rounding can reach the end of the interval."""
  return jnp.clip(jnp.floor(uniform * (last + 1)).astype(jnp.int32), 0, jnp.maximum(last, 0))


def _pair(name: str, size: Size) -> tuple[int, int]:
  height, width = (size, size) if isinstance(size, int) else size
  if height < 1 or width < 1:
    raise ValueError(f'{name} is {size}, expected positive numbers of pixels.')
  return height, width


def _check_box(box: jax.Array, shape: tuple[int, ...]) -> None:
  if not all(map(is_concrete, jax.tree.leaves(box))):
    return
  top, left, height, width = np.asarray(box).tolist()
  rows, columns = shape[:2]
  inside = 0 <= top <= rows - height and 0 <= left <= columns - width
  if not (inside and height >= 1 and width >= 1):
    raise ValueError(
      f'box (top, left, height, width) is {top, left, height, width}: expected at least a pixel, within '
      f'the {rows}x{columns} of the image.'
    )


def _check_fits(size: tuple[int, int], shape: tuple[int, ...]) -> None:
  if size[0] > shape[0] or size[1] > shape[1]:
    raise ValueError(
      f'the crop {size[0]}x{size[1]} is larger than the image {shape[0]}x{shape[1]} (padding '
      'included); choose a smaller size or resize first.'
    )


def _check_range(name: str, values: tuple[float, float]) -> None:
  if not 0 < values[0] <= values[1]:
    raise ValueError(f'{name} is {values}, expected 0 < low <= high.')
