"""Token-to-token vision transformers (Yuan et al. 2021, arXiv 2101.11986).

Patches overlap: tokens are regrouped three times, 7x7 with stride 4, then 3x3 with stride 2 twice, with a
layer of attention of few channels between. Modules are named as in the official code, `tokens_to_token` as
`tokens`, its `attention1` so; the blocks as in `ViT`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlab.models.attention import softmax
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import LayerNorm
from jaxlab.models.resnet import check_images
from jaxlab.models.transformer_layers import Mlp, linear
from jaxlab.models.vit import Block, draw_survival

Array = jax.Array

SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride, padding


def soft_split(x: Array, kernel: int, stride: int, padding: int) -> Array:
  """Returns the overlapping patches of maps, `[batch, rows, columns, channels * kernel^2]`.

  Within a patch the order is channel, row, column, as PyTorch's `unfold`.
  """
  return jax.lax.conv_general_dilated_patches(
    x,
    (kernel, kernel),
    (stride, stride),
    [(padding, padding)] * 2,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def sinusoid(positions: int, width: int) -> np.ndarray:
  """Returns the fixed code of positions: `sin` of `p / 10000^(2 (i // 2) / width)`, `cos` at odd `i`."""
  index = np.arange(width)
  angle = np.arange(positions)[:, None] / 10000.0 ** (2 * (index // 2) / width)
  return np.where(index % 2, np.cos(angle), np.sin(angle)).astype(np.float32)


def orthogonal_features(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
  """Returns `features` orthonormal rows times sqrt(features), for `shape` `(features, width)`."""
  return nn.initializers.orthogonal(math.sqrt(shape[0]))(key, shape, dtype)


class TokenAttention(nn.Module):
  """One pre-norm layer of a stem: attention to `width` channels around the values, then an MLP.

  `x = v + proj(attention(q, k, v))` of `norm1(x)`, as the input has other channels; `x + mlp(norm2(x))`.
  With `performer` the softmax of the scores is approximated by `width / 2` positive random features
  (Choromanski et al. 2021), in linear time: a parameter `random_features`, which gets no gradient. Without,
  scores are divided by the root of the *input's* channels, as in the official code.
  """

  width: int = 64
  performer: bool = True
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, tokens, channels]` to `[batch, tokens, width]`."""
    channels = x.shape[-1]
    x = LayerNorm(1e-5, self.dtype, name='norm1')(x)
    if self.performer:
      key, query, value = jnp.split(linear(3 * self.width, self.dtype, 'kqv')(x), 3, axis=-1)
      y = self._linear_attention(query, key, value)
    else:
      qkv = linear(3 * self.width, self.dtype, 'qkv', use_bias=False)(x)
      query, key, value = jnp.split(qkv, 3, axis=-1)
      scores = jnp.einsum('bqc,bkc->bqk', query * channels**-0.5, key)
      wide = jnp.promote_types(scores.dtype, jnp.float32)
      weights = HookPoint(name='softmax')(softmax(scores.astype(wide)).astype(value.dtype))
      y = weights @ value
    x = value + linear(self.width, self.dtype, 'proj')(y)
    x = HookPoint(name='residual')(x)
    return x + Mlp(self.width, self.dtype, name='mlp')(LayerNorm(1e-5, self.dtype, name='norm2')(x))

  def _linear_attention(self, query: Array, key: Array, value: Array) -> Array:
    count = self.width // 2
    drawn = self.param('random_features', orthogonal_features, (count, self.width), jnp.float32)
    drawn = jax.lax.stop_gradient(drawn)

    def positive(x: Array) -> Array:
      wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
      norm = jnp.sum(jnp.square(wide), -1, keepdims=True) / 2
      return jnp.exp(wide @ drawn.T - norm) / math.sqrt(count)

    query, key, wide = positive(query), positive(key), value.astype(jnp.float32)
    total = jnp.einsum('bqm,bm->bq', query, jnp.sum(key, 1))[..., None]
    mixed = jnp.einsum('bkm,bkc->bmc', key, wide)
    return (jnp.einsum('bqm,bmc->bqc', query, mixed) / (total + 1e-8)).astype(value.dtype)


class TokensToToken(nn.Module):
  """The stem: three soft splits, with `attention1` and `attention2` between them, and `project`."""

  width: int
  token_width: int = 64
  performer: bool = True
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, height, width, channels]` to `[batch, rows, columns, width]`, a 16th of each side."""
    for index, split in enumerate(SPLITS):
      x = soft_split(x, *split)
      if index < 2:
        own = TokenAttention(
          self.token_width, self.performer, self.dtype, name=f'attention{index + 1}'
        )
        x = own(x.reshape(x.shape[0], -1, x.shape[-1])).reshape(*x.shape[:-1], self.token_width)
    return linear(self.width, self.dtype, 'project')(x)


class T2TViT(nn.Module):
  """A token-to-token ViT over float images `[batch, height, width, channels]` of any size.

  `tokens`, the class token, a fixed code of positions, `blocks_i`, `norm`, the class token's features (hook
  point `pool`), `head`.

  Attributes:
    width: channels of a token.
    depth: number of blocks.
    num_heads: attention heads, a divisor of `width`.
    mlp_ratio: hidden channels of the MLP over `width`.
    performer: whether the stem's attention is linear, see `TokenAttention`.
    token_width: channels of the stem's attention.
    num_classes: size of the classifier; None returns the class token's features.
    drop_path: as in `ViT`; needs the rng stream `drop_path`.
    dtype: of the computation (parameters stay float32); None: as the input.

  Raises:
    ValueError: at construction, if a field is out of its range; when called, for images whose sides are no
      multiple of 16.
  """

  width: int = 256
  depth: int = 7
  num_heads: int = 4
  mlp_ratio: float = 2.0
  performer: bool = True
  token_width: int = 64
  num_classes: int | None = None
  drop_path: float = 0.0
  dtype: Any = None

  def __post_init__(self):
    if self.width % self.num_heads:
      raise ValueError(
        f'T2TViT: width={self.width} is not divisible by num_heads={self.num_heads}.'
      )
    if not 0 <= self.drop_path < 1:
      raise ValueError(f'T2TViT: drop_path={self.drop_path} is not in [0, 1).')
    if self.num_classes is not None and self.num_classes < 1:
      raise ValueError(f'T2TViT: num_classes={self.num_classes}; give None for pooled features.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns logits `[batch, num_classes]`, or features `[batch, width]` without classifier."""
    check_images(x)
    batch, *sides, _ = x.shape
    if any(side % 16 for side in sides) or not min(sides):
      raise ValueError(f'T2TViT: image sides must be multiples of 16, got {tuple(sides)}.')
    stem = TokensToToken(self.width, self.token_width, self.performer, self.dtype, name='tokens')
    x = stem(x).reshape(batch, -1, self.width)
    token = self.param('cls_token', nn.initializers.normal(0.02), (1, 1, self.width), jnp.float32)
    token = jnp.broadcast_to(token.astype(x.dtype), (batch, 1, self.width))
    x = jnp.concatenate([token, x], axis=1)
    x = x + jnp.asarray(sinusoid(x.shape[1], self.width), x.dtype)
    survival = None
    if train and self.drop_path:
      rates = np.linspace(0, self.drop_path, self.depth)
      survival = draw_survival(self.make_rng('drop_path'), rates, batch)
    for index in range(self.depth):
      block = Block(
        self.num_heads, self.mlp_ratio, False, self.dtype, epsilon=1e-5, name=f'blocks_{index}'
      )
      x = block(x, None if survival is None else survival[index])
    x = HookPoint(name='pool')(LayerNorm(1e-5, self.dtype, name='norm')(x)[:, 0])
    return x if self.num_classes is None else linear(self.num_classes, self.dtype, 'head')(x)
