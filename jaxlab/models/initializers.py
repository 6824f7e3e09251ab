"""Initial weights as PyTorch's layers and the standard networks draw them."""

import math
from typing import Any

import jax
from flax import linen as nn

Initializer = jax.nn.initializers.Initializer

# Normal with variance 2 / (out channels * kernel area): He et al. 2015, as torchvision's ResNets.
kaiming_normal_fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')

# Normal with variance 2 / (in channels * kernel area): the CIFAR ResNets of the long-tail literature.
kaiming_normal_fan_in = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')

# Uniform within +-1/sqrt(fan_in): the default of PyTorch's Linear and Conv2d weights.
torch_default = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')

# timm and DINO truncate this normal at +-2, a hundred standard deviations away.
vit_normal = nn.initializers.normal(0.02)


def torch_default_bias(fan_in: int) -> Initializer:
  """Returns the initializer of PyTorch's default bias: uniform within +-1/sqrt(`fan_in`)."""
  bound = 1 / math.sqrt(fan_in)

  def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = float, **_) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init
