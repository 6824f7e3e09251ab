"""Images as float arrays: conversion, normalization, separable filters, checks."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# (mean, std) per channel, images in [0, 1]. ImageNet: as torchvision; CIFAR-10: as SSQL's official
# code (Cao et al. 2022), whose std is the widely copied mean of per-image deviations.
IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10_MEAN_STD = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def check_image(image: jax.Array, floating: bool = True) -> None:
  """Raises ValueError unless `image` is one float image `[height, width, channels]`."""
  if jnp.ndim(image) != 3:
    raise ValueError(
      f'image has shape {jnp.shape(image)}, expected [height, width, channels]; '
      'for a batch use jax.vmap(augment)(keys, images).'
    )
  if floating and not jnp.issubdtype(image.dtype, jnp.floating):
    raise ValueError(
      f'image has dtype {image.dtype}, expected floats in [0, 1]; convert it with to_float first.'
    )


def to_float(images: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
  """Returns uint8 images scaled to [0, 1] (`images / 255`); float images are only cast.

  >>> to_float(jnp.array([0, 255], jnp.uint8)).tolist()
  [0.0, 1.0]
  """
  if jnp.issubdtype(images.dtype, jnp.floating):
    return images.astype(dtype)
  if images.dtype != jnp.uint8:
    raise ValueError(f'images have dtype {images.dtype}, expected uint8 or floats.')
  return (images.astype(jnp.float32) / 255.0).astype(dtype)


def normalize(
  images: jax.Array, mean: Sequence[float] | float, std: Sequence[float] | float
) -> jax.Array:
  """Returns `(images - mean) / std`, with `mean` and `std` scalars or one value a channel.

  Args:
    images: floats `[..., height, width, channels]`.
    mean: subtracted.
    std: divides; must be positive.

  Raises:
    ValueError: if images are no floats, `std` is not positive, or a length differs from the number of
      channels.
  """
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(f'images has dtype {images.dtype}, expected floats: use to_float first.')
  mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
  if not np.all(std > 0):
    raise ValueError(f'std is {std.tolist()}, expected positive numbers.')
  for name, value in (('mean', mean), ('std', std)):
    if value.ndim and value.shape != images.shape[-1:]:
      raise ValueError(
        f'{name} has {value.size} values, but the images have {images.shape[-1]} channels.'
      )
  return (images - mean.astype(images.dtype)) / std.astype(images.dtype)


def luma(image: jax.Array) -> jax.Array:
  """Returns gray `[..., height, width, 1]` = 0.2989 R + 0.587 G + 0.114 B; one channel is kept.

  The weights of ITU-R BT.601 as torchvision rounds them. A sum of products, not a `dot`, which a TPU
  would compute in bfloat16.
  """
  if image.shape[-1] == 1:
    return image
  if image.shape[-1] != 3:
    raise ValueError(f'image has {image.shape[-1]} channels, expected 1 (gray) or 3 (RGB).')
  return 0.2989 * image[..., 0:1] + 0.587 * image[..., 1:2] + 0.114 * image[..., 2:3]


def apply_separable(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
  """Returns `out[p, q, c] = sum_hw rows[p, h] columns[q, w] image[h, w, c]` in the image's dtype.

  Args:
    image: `[height, width, channels]`.
    rows: `[out_height, height]`, usually float32.
    columns: `[out_width, width]`.

  Full precision is asked for: accelerators would otherwise round the operands to bfloat16.
  """
  highest = jax.lax.Precision.HIGHEST
  wide = image.astype(jnp.promote_types(image.dtype, rows.dtype))
  wide = jnp.einsum('ph,hwc->pwc', rows, wide, precision=highest)
  return jnp.einsum('qw,pwc->pqc', columns, wide, precision=highest).astype(image.dtype)
