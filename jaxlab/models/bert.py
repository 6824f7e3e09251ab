"""BERT (Devlin et al. 2019, arXiv 1810.04805) and RoBERTa: post-norm encoders over tokens.

MiniLM's sentence embeddings are such an encoder and `mean_embedding`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models import causal_attention
from jaxlab.models.activations import GELUS
from jaxlab.models.attention import attention_scores, softmax, weighted_values
from jaxlab.models.initializers import vit_normal
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import LayerNorm
from jaxlab.models.transformer_layers import Mlp, drop, linear

Array = jax.Array


class BertAttention(nn.Module):
  """Multi-head self-attention over real tokens, `proj(softmax(q k^T / sqrt(head width)) v)`.

  Layers `q_proj`, `k_proj`, `v_proj`, `proj`; hook points `query`, `key`, `value` `[batch, time, heads, head
  width]` and `softmax` `[batch, heads, queries, keys]`, which is taken in at least float32. Where a sequence
  holds padding alone, the weights are equal.
  """

  num_heads: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, mask: Array | None = None) -> Array:
    """Maps `[batch, time, width]` to the same shape; no token looks where `mask` `[batch, time]` is false."""
    width = x.shape[-1]
    heads = (*x.shape[:2], self.num_heads, width // self.num_heads)
    query, key, value = (
      HookPoint(name=name)(linear(width, self.dtype, f'{name[0]}_proj')(x).reshape(heads))
      for name in ('query', 'key', 'value')
    )
    scores = attention_scores(query, key)
    if mask is not None:
      lowest = jnp.where(mask, 0, jnp.finfo(scores.dtype).min).astype(scores.dtype)
      scores = scores + lowest[:, None, None]
    weights = HookPoint(name='softmax')(softmax(scores).astype(value.dtype))
    return linear(width, self.dtype, 'proj')(weighted_values(weights, value))


class BertBlock(nn.Module):
  """A post-norm block, `y = norm1(x + attention(x))`, then `norm2(y + mlp(y))`."""

  num_heads: int
  hidden: int
  activation: str = 'gelu'
  dropout: float = 0.0
  epsilon: float = 1e-12
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, mask: Array | None = None) -> Array:
    """Maps `[batch, time, width]` to the same shape; `mask` as in `BertAttention`."""
    norm = functools.partial(LayerNorm, self.epsilon, self.dtype)
    y = BertAttention(self.num_heads, self.dtype, name='attention')(x, mask)
    x = norm(name='norm1')(x + drop(y, self.dropout))
    y = Mlp(self.hidden, self.dtype, self.activation, name='mlp')(x)
    return norm(name='norm2')(x + drop(y, self.dropout))


class Bert(nn.Module):
  """A BERT encoder: `tokens [batch, time] -> vectors [batch, time, width]`.

  `word_embeddings` + `position_embeddings` + `token_type_embeddings`, `norm` (hook point `embeddings` behind
  it), blocks `layer_i`; with `num_classes` a `classifier` of each token.

  Attributes:
    vocab_size: number of tokens.
    max_length: number of stored positions.
    token_types: number of segments that tokens may belong to.
    first_position: position of the first token; RoBERTa's is behind that of its padding token, 2. Padding
      then has the position before the first.
    width: channels of a token.
    depth: number of blocks.
    num_heads: attention heads, a divisor of `width`.
    hidden: channels of the MLP; None: 4 `width`.
    activation: `'gelu'` (exact), `'gelu_tanh'` or `'quick_gelu'`.
    num_classes: size of the `classifier`; None returns the tokens' vectors.
    dropout: rate in training, on the embeddings and on what each branch adds (attention's own weights are
      not dropped). Needs the rng stream `dropout`.
    epsilon: of the LayerNorms.
    dtype: of the computation (parameters stay float32); None: float32.
    remat: recompute each block's activations in the backward pass instead of storing them.

  Raises:
    ValueError: at construction, if the heads do not divide the width or an option is out of range; when
      called, for anything but integer tokens `[batch, time]`, too many of them, or a mask or segments of
      another shape.
  """

  vocab_size: int = 30522
  max_length: int = 512
  token_types: int = 2
  first_position: int = 0
  width: int = 768
  depth: int = 12
  num_heads: int = 12
  hidden: int | None = None
  activation: str = 'gelu'
  num_classes: int | None = None
  dropout: float = 0.0
  epsilon: float = 1e-12
  dtype: Any = None
  remat: bool = False

  def __post_init__(self):
    if self.width % self.num_heads:
      raise ValueError(f'Bert: width={self.width} is not divisible by num_heads={self.num_heads}.')
    if self.activation not in GELUS:
      raise ValueError(f'Bert: activation={self.activation!r} is none of {tuple(GELUS)}.')
    if not 0 <= self.dropout < 1:
      raise ValueError(f'Bert: dropout={self.dropout} is not in [0, 1).')
    if not 0 <= self.first_position < self.max_length:
      raise ValueError(
        f'Bert: first_position={self.first_position} is not in [0, max_length={self.max_length}).'
      )
    if self.num_classes is not None and self.num_classes < 1:
      raise ValueError(f"Bert: num_classes={self.num_classes}; give None for the tokens' vectors.")
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    tokens: Array,
    train: bool = False,
    mask: Array | None = None,
    segments: Array | None = None,
  ) -> Array:
    """Returns vectors `[batch, time, width]`, or logits `[batch, time, num_classes]`.

    Args:
      tokens: integers `[batch, time]` in [0, vocab_size); too large ones give NaN, negative ones count from
        the end.
      train: apply dropout.
      mask: `[batch, time]`, false or 0 for padding on either side. Padding takes no position, so that the
        vectors of real tokens are those without it; its own vectors are transformers' for RoBERTa, else they
        mean nothing.
      segments: integers `[batch, time]` in [0, token_types), transformers' `token_type_ids`; None: 0.
    """
    causal_attention.check_tokens('Bert', tokens, self.max_length - self.first_position, mask)
    if segments is not None and segments.shape != tokens.shape:
      raise ValueError(
        f'Bert: segments {segments.shape} must have the shape of tokens, {tokens.shape}.'
      )
    dropout = self.dropout if train else 0.0
    if mask is None:
      positions = jnp.arange(tokens.shape[1])[None]
    else:
      mask = mask.astype(bool)
      positions = causal_attention.count_before(mask)
      if self.first_position:
        positions = jnp.where(mask, positions, -1)
    embed = functools.partial(
      nn.Embed, features=self.width, embedding_init=vit_normal, dtype=self.dtype
    )
    segments = jnp.zeros((1, 1), jnp.int32) if segments is None else segments
    x = embed(self.vocab_size, name='word_embeddings')(tokens)
    x = x + embed(self.token_types, name='token_type_embeddings')(segments)
    x = x + embed(self.max_length, name='position_embeddings')(positions + self.first_position)
    x = LayerNorm(self.epsilon, self.dtype, name='norm')(x)
    x = HookPoint(name='embeddings')(drop(x, dropout))
    block = nn.remat(BertBlock) if self.remat else BertBlock
    for index in range(self.depth):
      x = block(
        self.num_heads,
        self.hidden or 4 * self.width,
        self.activation,
        dropout,
        self.epsilon,
        self.dtype,
        name=f'layer_{index}',
      )(x, mask)
    return x if self.num_classes is None else linear(self.num_classes, self.dtype, 'classifier')(x)


def mean_embedding(vectors: Array, mask: Array | None = None, *, normalize: bool = True) -> Array:
  """Returns the mean of each sequence's real tokens, by default of length 1: sentence embeddings.

  Reimers & Gurevych 2019 (arXiv 1908.10084), as sentence-transformers' mean pooling and normalization.

  Args:
    vectors: `[batch, time, width]`.
    mask: `[batch, time]`, false or 0 for padding; None: all tokens are real.
    normalize: divide by the Euclidean norm.

  Returns:
    `[batch, width]` in at least float32; 0 for a sequence without real tokens.

  Raises:
    ValueError: if `mask` is not of the shape `[batch, time]`.
  """
  mask = jnp.ones(vectors.shape[:2], bool) if mask is None else mask
  if mask.shape != vectors.shape[:2]:
    raise ValueError(
      f'mean_embedding: mask {mask.shape} must be [batch, time] of vectors {vectors.shape}.'
    )
  vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
  real = (mask != 0)[..., None]
  # Selected, not multiplied: what padding holds means nothing and may not be finite.
  total = jnp.sum(jnp.where(real, vectors, 0), axis=1)
  mean = total / jnp.maximum(jnp.sum(real, axis=1), 1).astype(vectors.dtype)
  if not normalize:
    return mean
  square = jnp.sum(jnp.square(mean), axis=-1, keepdims=True)
  return mean * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
