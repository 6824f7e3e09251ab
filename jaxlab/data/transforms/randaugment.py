"""RandAugment (Cubuk et al. 2020) on the device, as timm defines it.

timm's `rand-m9-mstd0.5-inc1` is `rand_augment` with its defaults, after crop and flip and before the
normalization. The operations are Pillow's on images of 8 bits: values are rounded to `k / 255` on entry and,
as Pillow does, cut down to such a level after each operation.

Under `vmap` a choice between operations computes all of them. So they are three families, each computed once
for all its members: a table over the 256 levels, a blend with some other image, an affine transformation.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.data.transforms.crop import cubic
from jaxlab.data.transforms.image import check_image

OPERATIONS = (
  'AutoContrast',
  'Equalize',
  'Invert',
  'Posterize',
  'Solarize',
  'SolarizeAdd',
  'Color',
  'Contrast',
  'Brightness',
  'Sharpness',
  'Rotate',
  'ShearX',
  'ShearY',
  'TranslateX',
  'TranslateY',
)
TABLES, BLENDS = 6, 4  # the first six operations are tables, the next four blends

MAX_LEVEL = 10.0
Interpolation = Literal['bilinear', 'bicubic', 'random']


def rand_augment(
  key: jax.Array,
  image: jax.Array,
  *,
  magnitude: float = 9.0,
  magnitude_std: float = 0.5,
  num_ops: int = 2,
  probability: float = 0.5,
  increasing: bool = True,
  fill: Sequence[float] | float = 128 / 255,
  interpolation: Interpolation = 'random',
) -> jax.Array:
  """Returns the image after `num_ops` operations drawn uniformly from `OPERATIONS`, with replacement.

  Each is left out with probability `1 - probability`; else its level is drawn from a normal distribution
  and clipped to [0, 10], and its direction, where it has one, is a fair coin.

  Args:
    key: a typed key.
    image: floats in [0, 1], `[height, width, 1 or 3]`.
    magnitude: mean level, 0 to 10.
    magnitude_std: standard deviation of the level; infinity: the level is uniform in [0, magnitude].
    num_ops: operations in turn.
    probability: of each drawn operation to be applied.
    increasing: whether more magnitude is more change in all operations (timm's `inc1`); see
      `apply_operation`.
    fill: what rotations, shears and translations see outside of the image: a number or one a channel, in
      [0, 1]. timm's own default is mid-gray; its training recipes pass the mean of the data set.
    interpolation: of these. `'random'` (timm's own default) draws bilinear or bicubic each time; its
      training recipes pass that of the crop.

  Raises:
    ValueError: for arguments out of these ranges.
  """
  _check(image, fill, interpolation)
  if not 0 <= magnitude <= MAX_LEVEL:
    raise ValueError(f'magnitude is {magnitude}, expected a number in [0, {MAX_LEVEL:g}].')
  if not magnitude_std >= 0:
    raise ValueError(f'magnitude_std is {magnitude_std}, expected a number >= 0.')
  if num_ops < 1:
    raise ValueError(f'num_ops is {num_ops}, expected a positive number.')
  if not 0 <= probability <= 1:
    raise ValueError(f'probability is {probability}, expected a number in [0, 1].')

  def operate(codes: jax.Array, draws: jax.Array) -> tuple[jax.Array, None]:
    chosen, coin, level, sign, cubic_coin = draws
    if math.isinf(magnitude_std):
      level = magnitude * level
    else:
      normal = jax.scipy.special.ndtri(jnp.clip(level, 1e-6, 1 - 1e-6))
      level = magnitude + magnitude_std * normal
    changed = _operate(
      codes,
      jnp.minimum(jnp.floor(len(OPERATIONS) * chosen), len(OPERATIONS) - 1).astype(jnp.int32),
      jnp.clip(level, 0, MAX_LEVEL),
      jnp.where(sign < 0.5, 1.0, -1.0),
      increasing,
      fill,
      cubic_coin < 0.5 if interpolation == 'random' else interpolation == 'bicubic',
    )
    return jnp.where(coin < probability, changed, codes), None

  # One flat draw and a scan: an eighth of the compilation of separate draws and operations in a row.
  draws = jax.random.uniform(key, (5 * num_ops,), jnp.float32).reshape(num_ops, 5)
  codes, _ = jax.lax.scan(operate, _to_codes(image), draws)
  return (codes / 255).astype(image.dtype)


def apply_operation(
  image: jax.Array,
  operation: jax.Array | int,
  level: jax.Array | float,
  *,
  positive: jax.Array | bool = True,
  increasing: bool = True,
  fill: Sequence[float] | float = 128 / 255,
  interpolation: Literal['bilinear', 'bicubic'] = 'bilinear',
) -> jax.Array:
  """Returns the image after one operation at a level `m` in [0, 10].

  - AutoContrast, Equalize, Invert: of each channel; they have no level.
  - Posterize keeps the `4 - floor(0.4 m)` highest bits.
  - Solarize inverts codes (0 to 255) from `256 - floor(25.6 m)` on; SolarizeAdd adds `floor(11 m)` to those
    below 128.
  - Color, Contrast, Brightness, Sharpness: the factor `max(0.1, 1 +- 0.09 m)` on the difference from, in
    turn, the gray image, its mean, black, the smoothed image.
  - Rotate by `+-3 m` degrees (counterclockwise), ShearX and ShearY by `+-0.03 m`, TranslateX and TranslateY
    by `+-0.045 m` of the side (to the left, upwards).

  Not `increasing`: `floor(0.4 m)` bits, inversion from `floor(25.6 m)` on, the factor `0.1 + 0.18 m`.

  Args:
    image: floats in [0, 1], `[height, width, 1 or 3]`; rounded to 8 bits.
    operation: index into `OPERATIONS`; may be traced.
    level: `m`; may be traced.
    positive: the sign where there are two; may be traced.
    increasing: see above.
    fill: value outside of the image; a number or one a channel, in [0, 1].
    interpolation: `'bilinear'` or `'bicubic'`.

  Raises:
    ValueError: for another kind of image, fill or interpolation, and for an operation or level out of range.
  """
  _check(image, fill, interpolation)
  if interpolation == 'random':
    raise ValueError("interpolation='random' is for rand_augment; choose 'bilinear' or 'bicubic'.")
  for name, value, most in (
    ('operation', operation, len(OPERATIONS) - 1),
    ('level', level, MAX_LEVEL),
  ):
    if not isinstance(value, jax.core.Tracer) and not 0 <= value <= most:
      raise ValueError(f'{name} is {value}, expected 0 to {most:g}.')
  codes = _operate(
    _to_codes(image),
    jnp.asarray(operation),
    jnp.asarray(level, jnp.float32),
    jnp.where(positive, 1.0, -1.0),
    increasing,
    fill,
    interpolation == 'bicubic',
  )
  return (codes / 255).astype(image.dtype)


def _check(image: jax.Array, fill: Sequence[float] | float, interpolation: str) -> None:
  check_image(image)
  if image.shape[-1] not in (1, 3):
    raise ValueError(f'image has {image.shape[-1]} channels, expected 1 (gray) or 3 (RGB).')
  values = np.asarray(fill)
  if values.ndim and values.shape != image.shape[-1:]:
    raise ValueError(f'fill is {fill}, expected a number or one for each of {image.shape[-1]}.')
  if not np.all((values >= 0) & (values <= 1)):
    raise ValueError(f'fill is {fill}, expected values in [0, 1].')
  if interpolation not in Interpolation.__args__:
    raise ValueError(
      f'interpolation is {interpolation!r}, expected one of {Interpolation.__args__}.'
    )


def _to_codes(image: jax.Array) -> jax.Array:
  """Returns whole numbers 0 to 255, as float32."""
  return jnp.clip(jnp.round(image.astype(jnp.float32) * 255), 0, 255)


def _operate(codes, operation, level, sign, increasing, fill, bicubic) -> jax.Array:
  """Returns the codes `[height, width, channels]` after one operation; all scalars may be traced."""
  factor = jnp.maximum(1 + sign * 0.09 * level, 0.1) if increasing else 0.1 + 0.18 * level
  fill = jnp.round(255 * jnp.asarray(fill, jnp.float32))
  tabled = _look_up(codes, _table(codes, operation, level, increasing))
  blended = _blend(codes, operation - TABLES, factor)
  moved = _transform(codes, _matrix(codes.shape, operation, sign * level), fill, bicubic)
  changed = jnp.where(operation < TABLES + BLENDS, blended, moved)
  # Pillow truncates; the summand is for whole numbers that float32 misses by its last places.
  return jnp.clip(jnp.floor(jnp.where(operation < TABLES, tabled, changed) + 1e-3), 0, 255)


def _table(codes, operation, level, increasing) -> jax.Array:
  """Returns what becomes of each level, `[256, channels]`, by the first six of `OPERATIONS`."""
  grid = jnp.arange(256, dtype=jnp.float32)[:, None]
  counts = _histogram(codes)
  low, high = jnp.min(codes, (0, 1)), jnp.max(codes, (0, 1))
  stretched = jnp.floor((grid - low) * 255 / jnp.maximum(high - low, 1))

  # Pillow's rule: the pixels of the highest level present do not count for the width of a step.
  last = jnp.sum(jnp.where(grid == high, counts, 0), 0)
  step = (jnp.sum(counts, 0) - last) // 255
  below = jnp.cumsum(counts, 0) - counts
  equalized = jnp.where(step > 0, (below + step // 2) // jnp.maximum(step, 1), grid)

  bits, threshold = jnp.floor(level * 4 / 10), jnp.floor(level * 256 / 10)
  if increasing:
    bits, threshold = 4 - bits, 256 - threshold
  width = jnp.exp2(8 - bits)
  tables = (
    jnp.where(high > low, stretched, grid),
    equalized,
    255 - grid,
    jnp.floor(grid / width) * width,
    jnp.where(grid < threshold, grid, 255 - grid),
    jnp.where(grid < 128, grid + jnp.floor(level * 110 / 10), grid),
  )
  tables = jnp.stack([jnp.broadcast_to(table, counts.shape) for table in tables])
  return jnp.clip(tables[jnp.minimum(operation, TABLES - 1)], 0, 255)


def _histogram(codes: jax.Array) -> jax.Array:
  """Returns the counts of the 256 levels, `[256, channels]`.

  The product of two one-hot matrices of the codes' upper and lower four bits: no sort and no scatter,
  exact in bfloat16 with sums in float32.
  """
  flat = codes.reshape(-1, codes.shape[-1])
  upper = jax.nn.one_hot(flat // 16, 16, dtype=jnp.bfloat16)
  lower = jax.nn.one_hot(flat % 16, 16, dtype=jnp.bfloat16)
  counts = jnp.einsum('pcu,pcl->ulc', upper, lower, preferred_element_type=jnp.float32)
  return counts.reshape(256, -1)


def _look_up(codes: jax.Array, table: jax.Array) -> jax.Array:
  flat = codes.astype(jnp.int32).reshape(-1, codes.shape[-1])
  return jnp.take_along_axis(table, flat, 0).reshape(codes.shape)


def _blend(codes: jax.Array, kind: jax.Array, factor: jax.Array) -> jax.Array:
  """Returns `target + factor (codes - target)`; kinds: gray image, its mean, black, smoothed image."""
  gray = _gray(codes)
  targets = (gray, jnp.floor(jnp.mean(gray) + 0.5), 0.0, _smooth(codes))
  target = jnp.select(
    [kind == index for index in range(BLENDS)],
    [jnp.broadcast_to(image, codes.shape) for image in targets],
    codes,
  )
  return target + factor * (codes - target)


def _gray(codes: jax.Array) -> jax.Array:
  """Returns the luma of ITU-R BT.601, `[height, width, 1]`, in Pillow's integers (exact in float32)."""
  if codes.shape[-1] == 1:
    return codes
  red, green, blue = jnp.split(codes, 3, axis=-1)
  return jnp.floor((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536)


def _smooth(codes: jax.Array) -> jax.Array:
  """Returns the mean of 3 x 3 pixels with weight 5 of 13 in the center; the border stays (Pillow)."""
  if min(codes.shape[:2]) < 3:
    return codes
  rows = codes[:-2] + codes[1:-1] + codes[2:]
  box = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
  inner = jnp.round((box + 4 * codes[1:-1, 1:-1]) / 13)
  return codes.at[1:-1, 1:-1].set(inner)


def _matrix(shape: tuple[int, ...], operation: jax.Array, level: jax.Array) -> jax.Array:
  """Returns `[2, 3]`: (x, y, 1) of a result's pixel to the (x, y) that it is read from, in pixels."""
  height, width, _ = shape
  rotate, shear_x, shear_y, shift_x, shift_y = (
    operation == index for index in range(TABLES + BLENDS, len(OPERATIONS))
  )
  angle = jnp.where(rotate, -jnp.deg2rad(3 * level), 0)
  cosine, sine = jnp.cos(angle), jnp.sin(angle)
  center_x, center_y = width / 2, height / 2
  shear, shift = 0.03 * level, 0.045 * level
  return jnp.array(
    [
      [
        cosine,
        sine + jnp.where(shear_x, shear, 0),
        center_x - cosine * center_x - sine * center_y + jnp.where(shift_x, shift * width, 0),
      ],
      [
        -sine + jnp.where(shear_y, shear, 0),
        cosine,
        center_y + sine * center_x - cosine * center_y + jnp.where(shift_y, shift * height, 0),
      ],
    ]
  )


def _transform(
  codes: jax.Array, matrix: jax.Array, fill: jax.Array, bicubic: jax.Array | bool
) -> jax.Array:
  """Returns the affine transformation of the image; pixels read from outside of it are `fill`.

  Cubic convolution with a = -1 (Pillow's transformations; its resizing has -1/2); beyond the border the
  border pixel is repeated.
  """
  height, width, _ = codes.shape
  centers = (jnp.arange(side, dtype=jnp.float32) + 0.5 for side in (height, width))
  y, x = jnp.meshgrid(*centers, indexing='ij')
  source_x = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]
  source_y = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]
  inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
  left, top = jnp.floor(source_x - 0.5), jnp.floor(source_y - 0.5)
  right_share, bottom_share = source_x - 0.5 - left, source_y - 0.5 - top
  taps = 4 if isinstance(bicubic, jax.Array) or bicubic else 2

  def weight(distance: jax.Array) -> jax.Array:
    linear = jnp.maximum(1 - distance, 0)
    return jnp.where(bicubic, cubic(distance, -1.0), linear)

  def add(tap: jax.Array, total: jax.Array) -> jax.Array:
    down, right = tap // taps - (taps // 2 - 1), tap % taps - (taps // 2 - 1)
    rows = jnp.clip(top + down, 0, height - 1).astype(jnp.int32)
    columns = jnp.clip(left + right, 0, width - 1).astype(jnp.int32)
    share = weight(jnp.abs(bottom_share - down)) * weight(jnp.abs(right_share - right))
    return total + share[..., None] * codes[rows, columns]

  # A loop, so that one gather is compiled and not sixteen.
  moved = jax.lax.fori_loop(0, taps * taps, add, jnp.zeros_like(codes))
  return jnp.where(inside[..., None], moved, fill)
