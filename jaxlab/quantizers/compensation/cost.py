"""What a compensation adds to a network: parameters and multiply-adds."""

import math
from collections.abc import Mapping

import jax

Array = jax.Array


def linear_cost(
  in_features: int, out_features: int, positions: int, *, groups: int = 1, kernel_size: int = 1
) -> tuple[int, int]:
  """Returns (parameters, multiply-adds for one example) of QwT's layer, bias included in the former.

  >>> linear_cost(384, 384, 197)  # a block of ViT-S
  (147840, 29048832)

  Args:
    in_features: channels of the block's input.
    out_features: channels of its output.
    positions: tokens, or pixels, of its output.
    groups: of the convolutional form.
    kernel_size: of the convolutional form.
  """
  weights = in_features // groups * kernel_size**2 * out_features
  return weights + out_features, weights * positions


def channel_affine_cost(channels: int, positions: int) -> tuple[int, int]:
  """Returns (parameters, multiply-adds for one example) of QwT-v2 at one module; folded, both are 0."""
  return 2 * channels, channels * positions


def bipolar_cost(
  in_features: int, out_features: int, positions: int, *, groups: int = 1, kernel_size: int = 1
) -> tuple[int, int]:
  """Returns (parameters, multiply-adds for one example) of NBC: QwT's, kappa, the bound and two scales.

  The element-wise logarithm and exponential are not counted.
  """
  parameters, products = linear_cost(
    in_features, out_features, positions, groups=groups, kernel_size=kernel_size
  )
  return parameters + 2 * out_features + 2, products + out_features * positions


def compensation_cost(arrays: Mapping[str, Array], out_shape: tuple[int, ...]) -> tuple[int, int]:
  """Returns (parameters, multiply-adds for one example) of a module's compensation, from its arrays.

  Args:
    arrays: of one module in the collection `'compensation'`.
    out_shape: of the module's output, batch first, channels last.
  """
  parameters = sum(math.prod(array.shape) for array in arrays.values())
  positions = math.prod(out_shape[1:-1])
  products = math.prod((arrays['gamma'] if 'gamma' in arrays else arrays['weight']).shape)
  if 'kappa' in arrays:
    products += arrays['kappa'].size
  return parameters, products * positions
