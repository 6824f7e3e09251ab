"""Changes of single images on the host by which a small data set is made larger, once."""

import numpy as np


def shuffle_tiles(rng: np.random.Generator, image: np.ndarray, grid: int) -> np.ndarray:
  """Returns an image cut into `grid` x `grid` tiles, in random order.

  Rows and columns behind the last whole tile stay where they are (inferred).

  Args:
    rng: draws the order.
    image: `[height, width, channels]`.
    grid: tiles along a side.

  Raises:
    ValueError: for a grid below 1, or more tiles than pixels along a side.

  >>> image = np.arange(4).reshape(2, 2, 1)
  >>> sorted(shuffle_tiles(np.random.default_rng(0), image, 2).reshape(-1).tolist())
  [0, 1, 2, 3]
  """
  height, width, channels = image.shape
  if not 1 <= grid <= min(height, width):
    raise ValueError(f'grid={grid}: expected 1 to {min(height, width)} tiles along a side.')
  rows, columns = height // grid, width // grid
  inside = image[: rows * grid, : columns * grid]
  tiles = inside.reshape(grid, rows, grid, columns, channels).swapaxes(1, 2)
  tiles = tiles.reshape(grid**2, rows, columns, channels)[rng.permutation(grid**2)]
  tiles = tiles.reshape(grid, grid, rows, columns, channels).swapaxes(1, 2)
  shuffled = image.copy()
  shuffled[: rows * grid, : columns * grid] = tiles.reshape(inside.shape)
  return shuffled


def cut_out_share(
  rng: np.random.Generator, image: np.ndarray, low: float = 0.2, high: float = 0.5
) -> np.ndarray:
  """Returns an image with a rectangle of zeros, whose sides are one share of the image's.

  The share is uniform between `low` and `high`, the rectangle lies uniformly inside.

  Args:
    rng: draws share and place.
    image: `[height, width, channels]`.
    low: smallest share.
    high: largest.

  Raises:
    ValueError: unless `0 <= low <= high <= 1`.
  """
  if not 0 <= low <= high <= 1:
    raise ValueError(f'{low=}, {high=}: expected shares in [0, 1], in this order.')
  share = rng.uniform(low, high)
  rows, columns = (int(side * share) for side in image.shape[:2])
  top, left = rng.integers(image.shape[0] - rows + 1), rng.integers(image.shape[1] - columns + 1)
  cut = image.copy()
  cut[top : top + rows, left : left + columns] = 0
  return cut


def rotate_degrees(image: np.ndarray, degrees: float) -> np.ndarray:
  """Returns a uint8 image turned counterclockwise around its middle, black where nothing was.

  By PIL, each pixel the nearest one of the image (inferred: PIL's default).

  Args:
    image: uint8 `[height, width, channels]`.
    degrees: of the turn.
  """
  from PIL import Image

  gray = image.shape[-1] == 1
  turned = Image.fromarray(image[..., 0] if gray else image).rotate(degrees)
  return np.asarray(turned).reshape(image.shape)
