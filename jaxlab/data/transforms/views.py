"""The augmentations of self-supervised methods: one image, several views."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jaxlab.data.transforms import randaugment
from jaxlab.data.transforms.augment import (
  Augment,
  compose,
  deterministic,
  random_apply,
  random_flip,
  random_gaussian_blur,
  random_grayscale,
  random_noise,
  random_rotation,
  random_solarize,
)
from jaxlab.data.transforms.color import random_color_jitter, random_contrast_brightness
from jaxlab.data.transforms.crop import random_resized_crop
from jaxlab.data.transforms.image import normalize, to_float


def resized_crop_augment(
  size: int,
  *,
  scale: tuple[float, float] = (0.2, 1.0),
  antialias: bool = True,
  interpolation: Literal['bilinear', 'bicubic'] = 'bilinear',
  jitter: tuple[float, float, float, float] | None = (0.4, 0.4, 0.4, 0.1),
  jitter_probability: float = 0.8,
  grayscale_probability: float = 0.2,
  blur_probability: float = 0.5,
  blur_kernel: int = 23,
  solarize_probability: float = 0.0,
  flip_probability: float = 0.5,
  rotation: float = 0.0,
  noise: float = 0.0,
  rand_augment: Mapping[str, Any] | None = None,
  mean: Sequence[float] | float = 0.0,
  std: Sequence[float] | float = 1.0,
  contrast: tuple[float, float] | None = None,
  brightness: tuple[float, float] | None = None,
) -> Augment:
  """Returns random resized crops with what is done to them, `(key, image) -> view`.

  Random resized crop; rotation; color jitter; grayscale; Gaussian blur with sigma ~ U(0.1, 2); solarization;
  flip; noise; normalization; and, for gray images, a change of contrast and brightness after it. A
  probability or strength of 0 leaves a step out.
  The defaults are the augmentation of MoCo v2, SimSiam and SSQL (Chen et al. 2020).
  With `rand_augment`, and without jitter, grayscale and blur, timm's for supervised training.

  Args:
    size: side of the view.
    scale: share of the image's area that the crop covers.
    antialias: filter when the crop is reduced.
    interpolation: of the crop.
    jitter: strengths of brightness, contrast, saturation, hue; None: no jitter.
    jitter_probability: of the jitter.
    grayscale_probability: of turning gray.
    blur_probability: of the blur.
    blur_kernel: taps of the blur, odd.
    solarize_probability: of inverting what is brighter than 1/2 (BYOL, DINO).
    flip_probability: of the horizontal flip.
    rotation: largest angle to either side, in radians.
    noise: standard deviation of Gaussian noise on images in [0, 1].
    rand_augment: options of `jaxlab.data.rand_augment`, applied after the flip; `fill` is by
      default the mean and `interpolation` that of the crop, as in timm's recipes. None: no RandAugment.
    mean: subtracted, of images in [0, 1].
    std: divides.
    contrast: (low, high) factors on normalized images; needs `brightness`.
    brightness: (low, high) summands on normalized images.
  """
  if (contrast is None) != (brightness is None):
    raise ValueError(f'contrast and brightness go together; got {contrast} and {brightness}.')
  crop = {'size': size, 'scale': scale, 'antialias': antialias, 'interpolation': interpolation}
  steps = [functools.partial(random_resized_crop, **crop)]
  if rotation:
    steps.append(functools.partial(random_rotation, limit=rotation))
  if jitter is not None and jitter_probability:
    color = functools.partial(
      random_color_jitter,
      **dict(zip(('brightness', 'contrast', 'saturation', 'hue'), jitter, strict=True)),
    )
    steps.append(random_apply(jitter_probability, color))
  if grayscale_probability:
    steps.append(functools.partial(random_grayscale, probability=grayscale_probability))
  if blur_probability:
    blur = functools.partial(random_gaussian_blur, kernel_size=blur_kernel)
    steps.append(random_apply(blur_probability, blur))
  if solarize_probability:
    steps.append(functools.partial(random_solarize, probability=solarize_probability))
  if flip_probability:
    steps.append(functools.partial(random_flip, probability=flip_probability))
  if noise:
    steps.append(functools.partial(random_noise, std=noise))
  if rand_augment is not None:
    options = {'fill': np.asarray(mean), 'interpolation': interpolation, **rand_augment}
    steps.append(functools.partial(randaugment.rand_augment, **options))
  steps.append(deterministic(normalize, mean, std))
  if contrast is not None:
    steps.append(
      functools.partial(random_contrast_brightness, contrast=contrast, brightness=brightness)
    )
  return compose(*steps)


def draw_views(
  augment: Augment, keys: jax.Array, images: jax.Array, count: int = 2
) -> list[jax.Array]:
  """Returns `count` independent views of each image, a list of `[batch, ...]`.

  Args:
    augment: `(key, image) -> view`.
    keys: one typed key an image, e.g. from `example_keys`.
    images: uint8, or floats in [0, 1], `[batch, height, width, channels]`.
    count: number of views.
  """
  images = to_float(images)
  view_keys = jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)
  # One mapped program for all views: it compiles in the time of one.
  return list(jax.vmap(lambda drawn: jax.vmap(augment)(drawn, images))(view_keys))
