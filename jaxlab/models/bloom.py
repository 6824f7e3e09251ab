"""BLOOM (Le Scao et al. 2022, arXiv 2211.05100): linear biases for positions, a norm behind the embedding.

Modules are named as in Hugging Face's transformers, `transformer.h.3.self_attention.dense` as
`h_3/self_attention/dense`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models import causal_attention
from jaxlab.models.activations import gelu_tanh
from jaxlab.models.alibi import alibi_bias, alibi_slopes
from jaxlab.models.causal_attention import Context, attend, key_positions_of
from jaxlab.models.embedding import Embed
from jaxlab.models.initializers import vit_normal
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import LayerNorm
from jaxlab.models.transformer_layers import flat_dot_general

Array = jax.Array
PyTree = Any


class BloomAttention(nn.Module):
  """Causal attention with ALiBi and one projection; hook points of `causal_attention.attend`.

  The outputs of `query_key_value` are ordered by head of keys and values: its query heads, its key, its
  value; with as many of these as query heads [q_0 | k_0 | v_0 | q_1 | ...].
  """

  num_heads: int
  num_kv_heads: int | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, context: Context | None = None) -> Array:
    """Maps `[batch, time, width]` to the same shape."""
    width, kv_heads = x.shape[-1], self.num_kv_heads or self.num_heads
    each, head_width = self.num_heads // kv_heads, width // self.num_heads
    dense = functools.partial(_dense, dtypes=(self.dtype, self.param_dtype))
    qkv = dense((self.num_heads + 2 * kv_heads) * head_width, name='query_key_value')(x)
    qkv = qkv.reshape(*x.shape[:2], kv_heads, each + 2, head_width)
    query = qkv[..., :each, :].reshape(*x.shape[:2], self.num_heads, head_width)
    slopes = alibi_slopes(self.num_heads)
    bias = alibi_bias(slopes, key_positions_of(x, context), jnp.promote_types(x.dtype, jnp.float32))
    y = attend(self, query, qkv[..., each, :], qkv[..., each + 1, :], context, bias=bias)
    return dense(width, name='dense')(y)


class BloomMlp(nn.Module):
  """`dense_4h_to_h(gelu(dense_h_to_4h(x)))`, hook point `gelu`, the tanh approximation."""

  hidden: int
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, time, width]` to the same shape."""
    dense = functools.partial(_dense, dtypes=(self.dtype, self.param_dtype))
    y = HookPoint(name='gelu')(gelu_tanh(dense(self.hidden, name='dense_h_to_4h')(x)))
    return dense(x.shape[-1], name='dense_4h_to_h')(y)


class BloomBlock(nn.Module):
  """A pre-norm decoder block: attention, then MLP, each around a shortcut; `residual` between them."""

  num_heads: int
  num_kv_heads: int | None
  hidden: int
  epsilon: float = 1e-5
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, context: Context | None = None) -> Array:
    """Maps `[batch, time, width]` to the same shape; without `context` plainly causal."""
    dtypes = (self.dtype, self.param_dtype)
    norm = functools.partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
    attention = BloomAttention(self.num_heads, self.num_kv_heads, *dtypes, name='self_attention')
    x = HookPoint(name='residual')(x + attention(norm(name='input_layernorm')(x), context))
    mlp = BloomMlp(self.hidden, *dtypes, name='mlp')
    return x + mlp(norm(name='post_attention_layernorm')(x))


class Bloom(nn.Module):
  """A BLOOM decoder: `tokens [batch, time] -> logits [batch, time, vocab_size]`.

  `word_embeddings`, `word_embeddings_layernorm`, blocks `h_i`, `ln_f`, and the head: the embedding again, or
  `lm_head`. There are no stored positions. Logits at a position depend on the tokens up to it alone.

  Attributes:
    vocab_size: number of tokens.
    width: channels of a token.
    depth: number of blocks.
    num_heads: query heads, a divisor of `width`.
    num_kv_heads: heads of keys and values, a divisor of `num_heads` (Ainslie et al. 2023, arXiv 2305.13245);
      None: `num_heads`, as in the published networks.
    hidden: channels of the MLP; None: 4 `width`.
    max_length: tokens for which the network is made: the default length of a cache. Longer sequences run.
    tied: the embedding is the head's kernel, too.
    epsilon: of the LayerNorms.
    dtype: of the computation; None: float32.
    param_dtype: of kernels and embedding: bfloat16 halves those of a network that is not trained.
    remat: recompute each block's activations in the backward pass instead of storing them.

  Raises:
    ValueError: at construction, if heads do not divide; when called, for anything but integer tokens
      `[batch, time]`.
  """

  vocab_size: int = 250880
  width: int = 4096
  depth: int = 30
  num_heads: int = 32
  num_kv_heads: int | None = None
  hidden: int | None = None
  max_length: int = 2048
  tied: bool = True
  epsilon: float = 1e-5
  dtype: Any = None
  param_dtype: Any = jnp.float32
  remat: bool = False

  def __post_init__(self):
    if self.width % self.num_heads:
      raise ValueError(f'Bloom: width={self.width} is not divisible by num_heads={self.num_heads}.')
    if self.num_heads % (self.num_kv_heads or self.num_heads):
      raise ValueError(
        f'Bloom: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}.'
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, tokens: Array, train: bool = False, mask: Array | None = None) -> Array:
    """Returns logits `[batch, time, vocab_size]`.

    Args:
      tokens: integers `[batch, time]` in [0, vocab_size); too large ones give NaN, negative ones count from
        the end.
      train: without effect: nothing differs in training.
      mask: `[batch, time]`, false or 0 for padding on either side. Padding takes no position, so that the
        logits of real tokens are those without it; its own logits mean nothing.
    """
    del train
    causal_attention.check_tokens('Bloom', tokens, None, mask)
    context = causal_attention.make_context(self, tokens, mask)
    dtypes = (self.dtype, self.param_dtype)
    norm = functools.partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
    embed = Embed(
      self.vocab_size,
      self.width,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      embedding_init=vit_normal,
      name='word_embeddings',
    )
    x = norm(name='word_embeddings_layernorm')(embed(tokens))
    block = nn.remat(BloomBlock) if self.remat else BloomBlock
    hidden = self.hidden or 4 * self.width
    for index in range(self.depth):
      x = block(
        self.num_heads, self.num_kv_heads, hidden, self.epsilon, *dtypes, name=f'h_{index}'
      )(x, context)
    x = norm(name='ln_f')(x)
    if self.tied:
      return embed.attend(x)
    return _dense(self.vocab_size, dtypes, 'lm_head', use_bias=False)(x)

  def init_cache(self, batch: int, length: int | None = None) -> dict[str, PyTree]:
    """Returns an empty collection `'cache'` for `batch` sequences of up to `length` tokens, padding included.

    `model.apply({**variables, 'cache': cache}, tokens, mutable=['cache'])` appends `tokens` (a whole prompt,
    or the next token) and returns their logits and the new cache. To append more than `length` (default:
    `max_length`) is not noticed and gives wrong results.
    """
    blocks = [(f'h_{index}', 'self_attention') for index in range(self.depth)]
    heads, head_width = self.num_kv_heads or self.num_heads, self.width // self.num_heads
    shape = (batch, length or self.max_length, heads, head_width)
    return causal_attention.empty_cache(blocks, shape, self.dtype)


def _dense(features: int, dtypes: tuple, name: str, use_bias: bool = True) -> nn.Dense:
  dtype, param_dtype = dtypes
  return nn.Dense(
    features,
    use_bias=use_bias,
    kernel_init=vit_normal,
    dtype=dtype,
    param_dtype=param_dtype,
    dot_general=flat_dot_general,
    name=name,
  )
