"""A classifier over a map of features in which each class looks at places of its own."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.initializers import Initializer, torch_default, torch_default_bias
from jaxlab.models.intercept import HookPoint

Array = jax.Array


class ClassAttention(nn.Module):
  """Each class weighs positions by a map of its own, and judges the features that this gives.

    a = softmax over positions of (W x + c);  y_k = v_k . sum_n a_kn x_n + b_k

  W is the layer `attention`, whose weights go through the hook point `weights`; v and b are `kernel`
  `[dim, num_classes]` and `bias`. All start as PyTorch's linear layers do.

  [inferred]: the journal version of PENCIL (Yi, Wang & Wu, TPAMI 2022, https://arxiv.org/abs/2202.08436) says
  that it adds "a simple attention structure" to the backbone for several labels, and no more.

  Attributes:
    num_classes: number of classes.
    kernel_init: initializer of both layers.
    dtype: of the computation; None: as the input.
  """

  num_classes: int
  kernel_init: Initializer = torch_default
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, height, width, dim]` to logits `[batch, num_classes]`.

    Raises:
      ValueError: for inputs of another number of axes.
    """
    if x.ndim != 4:
      raise ValueError(
        f'ClassAttention: expected a map [batch, height, width, dim], got {x.shape}.'
      )
    x = x.reshape(len(x), -1, x.shape[-1])
    dim, options = x.shape[-1], {'kernel_init': self.kernel_init, 'dtype': self.dtype}
    bias_init = torch_default_bias(dim)
    scores = nn.Dense(self.num_classes, bias_init=bias_init, name='attention', **options)(x)
    weights = HookPoint(name='weights')(jax.nn.softmax(scores, axis=1))
    features = jnp.einsum('bnk,bnd->bkd', weights, x.astype(weights.dtype))
    kernel = self.param('kernel', self.kernel_init, (dim, self.num_classes))
    bias = self.param('bias', bias_init, (self.num_classes,))
    kernel, bias = kernel.astype(features.dtype), bias.astype(features.dtype)
    return jnp.einsum('bkd,dk->bk', features, kernel) + bias
