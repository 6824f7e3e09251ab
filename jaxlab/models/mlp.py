"""Multi-layer perceptrons over flattened inputs, and linear classifiers as those without a hidden layer."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.initializers import Initializer, torch_default, torch_default_bias
from jaxlab.models.intercept import HookPoint

Array = jax.Array


class MLP(nn.Module):
  """Linear layers with ReLUs between them, over inputs `[batch, ...]` which are flattened.

  Hidden layer i is `fc{i}` with hook point `relu{i}`, the classifier `fc`. Weights and biases start as
  PyTorch's. Collection: `params`.

  Attributes:
    hidden: units of each hidden layer; `()` is a linear classifier.
    num_classes: size of the classifier `fc`; None returns the last hidden layer (or the flat input).
    kernel_init: initializer of the kernels.
    dtype: of the computation; None: as the input.

  Raises:
    ValueError: at construction, for sizes below 1; when called, for inputs that are not floats.
  """

  hidden: Sequence[int] = (64, 64)
  num_classes: int | None = None
  kernel_init: Initializer = torch_default
  dtype: Any = None

  def __post_init__(self):
    sizes = (*self.hidden, *([] if self.num_classes is None else [self.num_classes]))
    if any(size < 1 for size in sizes):
      raise ValueError(
        f'MLP: hidden={tuple(self.hidden)} and num_classes={self.num_classes} must be positive '
        f'(num_classes=None: features).'
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns logits `[batch, num_classes]`, or features `[batch, channels]` without classifier."""
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f'MLP: inputs must be floats [batch, ...], got {x.dtype} {x.shape}.')
    x = x.reshape(len(x), -1)
    return linear_layers(x, self.hidden, self.num_classes, self.kernel_init, self.dtype)


def linear_layers(
  x: Array,
  hidden: Sequence[int],
  num_classes: int | None,
  kernel_init: Initializer,
  dtype: Any = None,
) -> Array:
  """Returns linear layers with ReLUs between over `[batch, dim]`, children of the module that calls this.

  Hidden layer i is `fc{i}` with hook point `relu{i}`, the classifier, unless `num_classes` is None, `fc`.
  """

  def dense(features: int, name: str, x: Array) -> Array:
    bias_init = torch_default_bias(x.shape[-1])
    layer = nn.Dense(features, kernel_init=kernel_init, bias_init=bias_init, dtype=dtype, name=name)
    return layer(x)

  for index, features in enumerate(hidden):
    x = HookPoint(name=f'relu{index}')(nn.relu(dense(features, f'fc{index}', x)))
  return x if num_classes is None else dense(num_classes, 'fc', x)
