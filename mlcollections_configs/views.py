"""Augmentations that settings of self-supervised methods have in common."""


def photographs() -> dict:
  """Returns that of MoCo v2, SimSiam and SSQL on ImageNet."""
  return dict(
    kind='resized_crop',
    scale=(0.2, 1.0),
    jitter=(0.4, 0.4, 0.4, 0.1),
    jitter_probability=0.8,
    grayscale_probability=0.2,
    blur_probability=0.5,
    blur_kernel=23,
  )


def pasted_digits() -> dict:
  """Returns crops of gray digits, which no flip would leave what they are."""
  return dict(
    kind='resized_crop',
    scale=(0.4, 1.0),
    flip_probability=0.0,
    contrast=(0.6, 1.4),
    brightness=(-0.4, 0.4),
  )
