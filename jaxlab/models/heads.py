"""Projection and prediction heads of self-supervised methods."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.activations import gelu
from jaxlab.models.initializers import (
  Initializer,
  torch_default,
  torch_default_bias,
  vit_normal,
)
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import BatchNorm

Array = jax.Array

ACTIVATIONS = {'relu': nn.relu, 'gelu': gelu}


class MLPHead(nn.Module):
  """Linear layers with batch norms and activations between them, over features `[batch, channels]`.

  Layer i is `fc{i}`, `bn{i}`, then the activation with a hook point `relu{i}` (`gelu{i}`); the last layer
  has none. Collections: `params`, and `batch_stats` where there are norms.

  Attributes:
    features: output channels of each layer.
    hidden_norm: whether the layers before the last have a batch norm.
    last_norm: batch norm of the last layer: `'none'`, `'affine'`, or `'plain'` (no scale, no bias).
    hidden_bias: whether the layers before the last have a bias, or one such choice for each.
    last_bias: True, False, or `'frozen'`: a parameter that gets no gradient (SimSiam keeps one before its
      plain norm, which cancels it).
    activation: `'relu'` or `'gelu'` (exact).
    kernel_init: initializer of the kernels.
    bias_init: initializer of the biases; None is PyTorch's uniform default.
    norm_groups: groups of the batch with separate statistics, see `BatchNorm`.
    dtype: of the computation; None: as the input.
  """

  features: Sequence[int]
  hidden_norm: bool = True
  last_norm: str = 'none'
  hidden_bias: bool | Sequence[bool] = False
  last_bias: bool | str = True
  activation: str = 'relu'
  kernel_init: Initializer = torch_default
  bias_init: Initializer | None = None
  norm_groups: int = 1
  dtype: Any = None

  def __post_init__(self):
    if not self.features or min(self.features) < 1:
      raise ValueError(f'MLPHead: features={self.features} must be positive layer sizes.')
    for name, allowed in (
      ('last_norm', ('none', 'affine', 'plain')),
      ('last_bias', (True, False, 'frozen')),
      ('activation', tuple(ACTIVATIONS)),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(f'MLPHead: {name}={getattr(self, name)!r} is none of {allowed}.')
    own = self.hidden_bias
    if not isinstance(own, bool) and len(own) != len(self.features) - 1:
      raise ValueError(f'MLPHead: hidden_bias={own} for {len(self.features) - 1} hidden layers.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[batch, channels]` to `[batch, features[-1]]`."""
    last, hidden = len(self.features) - 1, self.hidden_bias
    biases = [hidden] * last if isinstance(hidden, bool) else list(hidden)
    for index, features in enumerate(self.features):
      bias = biases[index] if index < last else self.last_bias
      linear = _FrozenBiasDense if bias == 'frozen' else nn.Dense
      x = linear(
        features,
        use_bias=bool(bias),
        kernel_init=self.kernel_init,
        bias_init=self.bias_init or torch_default_bias(x.shape[-1]),
        dtype=self.dtype,
        name=f'fc{index}',
      )(x)
      affine = index < last or self.last_norm == 'affine'
      if self.hidden_norm if index < last else self.last_norm != 'none':
        norm = BatchNorm(
          use_scale=affine,
          use_bias=affine,
          groups=self.norm_groups,
          dtype=self.dtype,
          name=f'bn{index}',
        )
        x = norm(x, train)
      if index < last:
        activation = ACTIVATIONS[self.activation]
        x = HookPoint(name=f'{self.activation}{index}')(activation(x))
    return x


class _FrozenBiasDense(nn.Module):
  """`nn.Dense` whose parameter `bias` gets no gradient."""

  features: int
  use_bias: bool = True
  kernel_init: Initializer = torch_default
  bias_init: Initializer = nn.initializers.zeros
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features), jnp.float32)
    bias = jax.lax.stop_gradient(self.param('bias', self.bias_init, (self.features,), jnp.float32))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    return x @ kernel + bias


def simsiam_projector(hidden: int = 2048, features: int = 2048, **kwargs: Any) -> MLPHead:
  """Returns SimSiam's projector (Chen & He 2021): three layers, no biases, norms, the last one plain.

  In the official code `hidden` is the backbone's width. The last layer's bias exists, frozen.
  """
  return MLPHead((hidden, hidden, features), last_norm='plain', last_bias='frozen', **kwargs)


def simsiam_predictor(hidden: int = 512, features: int = 2048, **kwargs: Any) -> MLPHead:
  """Returns SimSiam's predictor: a norm inside, a bias and no norm at the end."""
  return MLPHead((hidden, features), **kwargs)


def byol_mlp(hidden: int = 4096, features: int = 256, **kwargs: Any) -> MLPHead:
  """Returns BYOL's projector, and predictor (Grill et al. 2020): biases everywhere, a norm inside."""
  return MLPHead((hidden, features), hidden_bias=True, **kwargs)


def moco_projector(hidden: int = 2048, features: int = 128, **kwargs: Any) -> MLPHead:
  """Returns the projector of MoCo v2 (Chen et al. 2020): two layers with biases, no norm."""
  return MLPHead((hidden, features), hidden_norm=False, hidden_bias=True, **kwargs)


def barlow_projector(hidden: int = 8192, features: int = 8192, **kwargs: Any) -> MLPHead:
  """Returns the projector of Barlow Twins (Zbontar et al. 2021): three layers, no biases."""
  return MLPHead((hidden, hidden, features), last_bias=False, **kwargs)


class DINOHead(nn.Module):
  """The head of DINO (Caron et al. 2021): an MLP, normalization, and a weight-normalized classifier.

  `logits = g * (v / |v|) . (y / |y|)` with `y` the MLP's output (three layers, exact GELU) and one direction
  `v` for each prototype: the columns of `last_layer_kernel`. Norms are bounded below by 1e-12. Hook point
  `bottleneck` holds the normalized features.

  Attributes:
    num_prototypes: number of logits.
    hidden: channels of the two hidden layers.
    bottleneck: channels of the MLP's output.
    norm_last_layer: keep `g` at 1; otherwise it is the trainable `last_layer_scale`, from 1.
    use_norm: whether the hidden layers have batch norms.
    dtype: of the computation; None: as the input.
  """

  num_prototypes: int = 65536
  hidden: int = 2048
  bottleneck: int = 256
  norm_last_layer: bool = True
  use_norm: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[batch, channels]` to logits `[batch, num_prototypes]`."""
    x = MLPHead(
      (self.hidden, self.hidden, self.bottleneck),
      hidden_norm=self.use_norm,
      hidden_bias=True,
      activation='gelu',
      kernel_init=vit_normal,
      bias_init=nn.initializers.zeros,
      dtype=self.dtype,
      name='mlp',
    )(x, train)
    x = HookPoint(name='bottleneck')(unit(x, axis=-1))
    shape = (self.bottleneck, self.num_prototypes)
    kernel = unit(self.param('last_layer_kernel', torch_default, shape, jnp.float32), axis=0)
    if not self.norm_last_layer:
      kernel = kernel * self.param('last_layer_scale', nn.initializers.ones, shape[1:], jnp.float32)
    x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
    return x @ kernel


def unit(x: Array, axis: int) -> Array:
  """Returns `x / max(|x|, 1e-12)` along `axis`, in the input's dtype; its gradient at 0 is finite."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.sum(wide * wide, axis, keepdims=True)
  return (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(x.dtype)
