"""GPT-2 (Radford et al. 2019), a pre-norm decoder with learned positions.

Modules are named as in Hugging Face's transformers, `transformer.h.3.mlp.c_fc` as `h_3/mlp/c_fc`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models import causal_attention
from jaxlab.models.activations import gelu, gelu_tanh
from jaxlab.models.causal_attention import Context, attend, positions_of
from jaxlab.models.embedding import Embed
from jaxlab.models.initializers import vit_normal
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import LayerNorm
from jaxlab.models.transformer_layers import drop, flat_dot_general

Array = jax.Array
PyTree = Any


class GPT2Attention(nn.Module):
  """Causal self-attention with one projection `c_attn`; hook points of `causal_attention.attend`.

  The outputs of `c_attn` are all queries, all keys, all values.
  """

  num_heads: int
  depth: int = 1
  dropout: float = 0.0
  dtype: Any = None
  num_kv_heads: int | None = None

  @nn.compact
  def __call__(self, x: Array, context: Context | None = None) -> Array:
    """Maps `[batch, time, width]` to the same shape."""
    width = x.shape[-1]
    head_width = width // self.num_heads
    kv_width = (self.num_kv_heads or self.num_heads) * head_width
    qkv = _dense(width + 2 * kv_width, self.dtype, 'c_attn')(x)
    parts = jnp.split(qkv, (width, width + kv_width), axis=-1)
    query, key, value = (part.reshape(*x.shape[:2], -1, head_width) for part in parts)
    y = attend(self, query, key, value, context)
    return drop(_dense(width, self.dtype, 'c_proj', self.depth)(y), self.dropout)


class GPT2Mlp(nn.Module):
  """`c_proj(gelu(c_fc(x)))`, hook point `gelu`: by default GPT-2's tanh approximation."""

  hidden: int
  depth: int = 1
  activation: str = 'gelu_tanh'
  dropout: float = 0.0
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, time, width]` to the same shape."""
    y = _dense(self.hidden, self.dtype, 'c_fc')(x)
    activation = gelu_tanh if self.activation == 'gelu_tanh' else gelu
    y = HookPoint(name='gelu')(activation(y))
    return drop(_dense(x.shape[-1], self.dtype, 'c_proj', self.depth)(y), self.dropout)


class GPT2Block(nn.Module):
  """A pre-norm decoder block: attention, then MLP, each around a shortcut; `residual` between them."""

  num_heads: int
  hidden: int
  depth: int = 1
  activation: str = 'gelu_tanh'
  dropout: float = 0.0
  epsilon: float = 1e-5
  dtype: Any = None
  num_kv_heads: int | None = None

  @nn.compact
  def __call__(self, x: Array, context: Context | None = None) -> Array:
    """Maps `[batch, time, width]` to the same shape; without `context` plainly causal."""
    norm = functools.partial(_layer_norm, self.epsilon, self.dtype)
    attention = GPT2Attention(
      self.num_heads, self.depth, self.dropout, self.dtype, self.num_kv_heads, name='attn'
    )
    x = HookPoint(name='residual')(x + attention(norm('ln_1')(x), context))
    mlp = GPT2Mlp(self.hidden, self.depth, self.activation, self.dropout, self.dtype, name='mlp')
    return x + mlp(norm('ln_2')(x))


class GPT2(nn.Module):
  """A GPT-2 decoder: `tokens [batch, time] -> logits [batch, time, vocab_size]`.

  `wte` + `wpe` (hook point `embeddings`), blocks `h_i`, `ln_f`, and the head: `wte` again, or `lm_head`.
  Linear layers store kernels (in, out), as Hugging Face's Conv1D does. Logits at a position depend on the
  tokens up to it alone.

  Attributes:
    vocab_size: number of tokens.
    max_length: number of stored positions.
    width: channels of a token.
    depth: number of blocks.
    num_heads: attention heads, a divisor of `width`.
    hidden: channels of the MLP; None: 4 `width`.
    activation: `'gelu_tanh'` or `'gelu'` (exact).
    tied: the embedding is the head's kernel, too; otherwise there is `lm_head`, without bias.
    dropout: rate in training, on the embeddings and on what each branch adds (attention's own weights are
      not dropped). Needs the rng stream `dropout`.
    epsilon: of the LayerNorms.
    dtype: of the computation (parameters stay float32); None: float32.
    remat: recompute each block's activations in the backward pass instead of storing them.
    num_kv_heads: heads of keys and values, a divisor of `num_heads` (Ainslie et al. 2023, arXiv 2305.13245);
      None: `num_heads`, as in the published networks.

  Raises:
    ValueError: at construction, if the heads do not divide the width or an option is out of range; when
      called, for anything but integer tokens `[batch, time]`, or too many of them.
  """

  vocab_size: int = 50257
  max_length: int = 1024
  width: int = 768
  depth: int = 12
  num_heads: int = 12
  hidden: int | None = None
  activation: str = 'gelu_tanh'
  tied: bool = True
  dropout: float = 0.0
  epsilon: float = 1e-5
  dtype: Any = None
  remat: bool = False
  num_kv_heads: int | None = None

  def __post_init__(self):
    if self.width % self.num_heads:
      raise ValueError(f'GPT2: width={self.width} is not divisible by num_heads={self.num_heads}.')
    if self.num_heads % (self.num_kv_heads or self.num_heads):
      raise ValueError(
        f'GPT2: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}.'
      )
    if self.activation not in ('gelu_tanh', 'gelu'):
      raise ValueError(f"GPT2: activation={self.activation!r}; choose 'gelu_tanh' or 'gelu'.")
    if not 0 <= self.dropout < 1:
      raise ValueError(f'GPT2: dropout={self.dropout} is not in [0, 1).')
    super().__post_init__()

  @nn.compact
  def __call__(self, tokens: Array, train: bool = False, mask: Array | None = None) -> Array:
    """Returns logits `[batch, time, vocab_size]`.

    Args:
      tokens: integers `[batch, time]` in [0, vocab_size); too large ones give NaN, negative ones count from
        the end.
      train: apply dropout.
      mask: `[batch, time]`, false or 0 for padding on either side. Padding takes no position, so that the
        logits of real tokens are those without it; its own logits mean nothing.
    """
    causal_attention.check_tokens('GPT2', tokens, self.max_length, mask)
    context = causal_attention.make_context(self, tokens, mask)
    dropout = self.dropout if train else 0.0
    embed = functools.partial(
      Embed, features=self.width, embedding_init=vit_normal, dtype=self.dtype
    )
    wte = embed(self.vocab_size, name='wte')
    x = wte(tokens) + embed(self.max_length, name='wpe')(positions_of(tokens, context))
    x = HookPoint(name='embeddings')(drop(x, dropout))
    block = nn.remat(GPT2Block) if self.remat else GPT2Block
    for index in range(self.depth):
      x = block(
        self.num_heads,
        self.hidden or 4 * self.width,
        self.depth,
        self.activation,
        dropout,
        self.epsilon,
        self.dtype,
        self.num_kv_heads,
        name=f'h_{index}',
      )(x, context)
    x = _layer_norm(self.epsilon, self.dtype, 'ln_f')(x)
    if self.tied:
      return wte.attend(x)
    return _dense(self.vocab_size, self.dtype, 'lm_head', use_bias=False)(x)

  def init_cache(self, batch: int, length: int | None = None) -> dict[str, PyTree]:
    """Returns an empty collection `'cache'` for `batch` sequences of up to `length` tokens, padding included.

    `model.apply({**variables, 'cache': cache}, tokens, mutable=['cache'])` appends `tokens` (a whole prompt,
    or the next token) and returns their logits and the new cache. To append more than `length` is not
    noticed and gives wrong results.

    Raises:
      ValueError: if `length` exceeds `max_length`.
    """
    length = length or self.max_length
    if length > self.max_length:
      raise ValueError(f'GPT2: a cache of {length} tokens exceeds max_length={self.max_length}.')
    blocks = [(f'h_{index}', 'attn') for index in range(self.depth)]
    heads = self.num_kv_heads or self.num_heads
    shape = (batch, length, heads, self.width // self.num_heads)
    return causal_attention.empty_cache(blocks, shape, self.dtype)


def _dense(
  features: int, dtype: Any, name: str, depth: int | None = None, use_bias: bool = True
) -> nn.Dense:
  """Returns GPT-2's linear layer; weights of deviation 0.02, with `depth` 0.02 / sqrt(2 depth).

  The latter are the projections into the residual stream, scaled by the number of residual additions.
  """
  init = nn.initializers.normal(0.02 / (2 * depth) ** 0.5) if depth else vit_normal
  return nn.Dense(
    features,
    use_bias=use_bias,
    kernel_init=init,
    dtype=dtype,
    dot_general=flat_dot_general,
    name=name,
  )


def _layer_norm(epsilon: float, dtype: Any, name: str) -> LayerNorm:
  return LayerNorm(epsilon=epsilon, dtype=dtype, name=name)
