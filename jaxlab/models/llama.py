"""Llama (Touvron et al. 2023, arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Qwen2 (Qwen team 2024, arXiv 2407.10671) is a Llama with biases of queries, keys and values,
`attention_bias='qkv'`.

Modules are named as in Hugging Face's transformers, `model.layers.3.self_attn.q_proj` as
`layers_3/self_attn/q_proj`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models import causal_attention
from jaxlab.models.causal_attention import (
  Context,
  attend,
  key_positions_of,
  positions_of,
)
from jaxlab.models.embedding import Embed
from jaxlab.models.initializers import vit_normal
from jaxlab.models.intercept import HookPoint
from jaxlab.models.rotary import RotaryScaling, rotary_embedding
from jaxlab.models.transformer_layers import flat_dot_general

Array = jax.Array
PyTree = Any
AttentionBias = bool | Literal['qkv']


class LlamaAttention(nn.Module):
  """Causal grouped-query attention on rotated queries and keys.

  Hook points of `causal_attention.attend`: `query` and `key` are those behind the rotation. Without
  `cache_rotated`, keys are cached as `k_proj` makes them, and rotated by their positions whenever they are
  read, behind the hook point `key_read`.
  """

  num_heads: int
  num_kv_heads: int
  head_width: int
  rope_theta: float = 10000.0
  rope_scaling: RotaryScaling | None = None
  use_bias: AttentionBias = False
  num_key_heads: int | None = None
  cache_rotated: bool = True
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, context: Context | None = None) -> Array:
    """Maps `[batch, time, width]` to the same shape."""
    dtypes = (self.dtype, self.param_dtype)

    def project(heads: int, name: str) -> Array:
      y = _dense(heads * self.head_width, dtypes, name, bool(self.use_bias))(x)
      return y.reshape(*x.shape[:2], heads, self.head_width)

    def read_key(key: Array) -> Array:
      key = HookPoint(name='key_read')(key)
      return rotated(key, key_positions_of(x, context))

    rotated = functools.partial(rotary_embedding, theta=self.rope_theta, scaling=self.rope_scaling)
    positions = positions_of(x, context)
    query = rotated(project(self.num_heads, 'q_proj'), positions)
    key = project(self.num_key_heads or self.num_kv_heads, 'k_proj')
    if self.cache_rotated:
      key, read_key = rotated(key, positions), None
    value = project(self.num_kv_heads, 'v_proj')
    y = attend(self, query, key, value, context, read_key=read_key)
    return _dense(x.shape[-1], dtypes, 'o_proj', self.use_bias is True)(y)


class LlamaMlp(nn.Module):
  """SwiGLU (Shazeer 2020), `down_proj(silu(gate_proj(x)) * up_proj(x))`, hook point `silu`."""

  hidden: int
  use_bias: bool = False
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, time, width]` to the same shape."""
    dtypes = (self.dtype, self.param_dtype)
    gate = _dense(self.hidden, dtypes, 'gate_proj', self.use_bias)(x)
    gate = HookPoint(name='silu')(nn.silu(gate))
    y = gate * _dense(self.hidden, dtypes, 'up_proj', self.use_bias)(x)
    return _dense(x.shape[-1], dtypes, 'down_proj', self.use_bias)(y)


class LlamaBlock(nn.Module):
  """A pre-norm decoder block: attention, then MLP, each around a shortcut; `residual` between them."""

  num_heads: int
  num_kv_heads: int
  head_width: int
  hidden: int
  rope_theta: float = 10000.0
  rope_scaling: RotaryScaling | None = None
  attention_bias: AttentionBias = False
  mlp_bias: bool = False
  epsilon: float = 1e-6
  num_key_heads: int | None = None
  cache_rotated: bool = True
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, context: Context | None = None) -> Array:
    """Maps `[batch, time, width]` to the same shape; without `context` plainly causal."""
    dtypes = (self.dtype, self.param_dtype)
    attention = LlamaAttention(
      self.num_heads,
      self.num_kv_heads,
      self.head_width,
      self.rope_theta,
      self.rope_scaling,
      self.attention_bias,
      self.num_key_heads,
      self.cache_rotated,
      *dtypes,
      name='self_attn',
    )
    x = x + attention(_rms_norm(self.epsilon, dtypes, 'input_layernorm')(x), context)
    x = HookPoint(name='residual')(x)
    mlp = LlamaMlp(self.hidden, self.mlp_bias, *dtypes, name='mlp')
    return x + mlp(_rms_norm(self.epsilon, dtypes, 'post_attention_layernorm')(x))


class Llama(nn.Module):
  """A Llama decoder: `tokens [batch, time] -> logits [batch, time, vocab_size]`.

  `embed_tokens`, blocks `layers_i`, `norm`, and the head: `lm_head`, or with `tied` the embedding again.
  Logits at a position depend on the tokens up to it alone.

  Attributes:
    vocab_size: number of tokens.
    width: channels of a token.
    depth: number of blocks.
    num_heads: query heads.
    num_kv_heads: heads of keys and values, a divisor of `num_heads` (Ainslie et al. 2023, arXiv 2305.13245);
      None: `num_heads`.
    head_width: channels of a head, even; None: `width / num_heads`.
    hidden: channels of the MLP.
    max_length: tokens for which the network is made: the default length of a cache. Longer sequences run.
    rope_theta: base of the rotary wavelengths.
    rope_scaling: of the rotary angles, as of Llama 3.1, or its fields by name; None: none.
    tied: the embedding is the head's kernel, too.
    attention_bias: biases of attention's four layers; `'qkv'`: of all but the output's, as in Qwen2.
    mlp_bias: biases of the MLP's three layers.
    epsilon: of the RMSNorms, which compute in at least float32.
    num_key_heads: heads of `k_proj`, a multiple of `num_kv_heads`, of which a hook at `self_attn/key` makes
      the `num_kv_heads` that are cached; None: there is no such hook. See `compression.group_heads`.
    cache_rotated: keys are cached behind their rotation; false: before it, so that they are rotated whenever
      they are read.
    dtype: of the computation; None: float32.
    param_dtype: of the parameters: bfloat16 halves those of a network that is not trained.
    remat: recompute each block's activations in the backward pass instead of storing them.

  Raises:
    ValueError: at construction, if heads do not divide, the head's width is odd, or biases are others; when
      called, for anything but integer tokens `[batch, time]`.
  """

  vocab_size: int = 32000
  width: int = 4096
  depth: int = 32
  num_heads: int = 32
  num_kv_heads: int | None = None
  head_width: int | None = None
  hidden: int = 11008
  max_length: int = 2048
  rope_theta: float = 10000.0
  rope_scaling: RotaryScaling | Mapping[str, float] | None = None
  tied: bool = False
  attention_bias: AttentionBias = False
  mlp_bias: bool = False
  epsilon: float = 1e-6
  num_key_heads: int | None = None
  cache_rotated: bool = True
  dtype: Any = None
  param_dtype: Any = jnp.float32
  remat: bool = False

  def __post_init__(self):
    if isinstance(self.rope_scaling, Mapping):
      known = [field.name for field in dataclasses.fields(RotaryScaling)]
      if unknown := [name for name in self.rope_scaling if name not in known]:
        raise ValueError(
          f'Llama: rope_scaling has {", ".join(unknown)}; expected some of {", ".join(known)} '
          "(from_config reads transformers' names)."
        )
      self.rope_scaling = RotaryScaling(**self.rope_scaling)
    if self.head_width is None and self.width % self.num_heads:
      raise ValueError(
        f'Llama: width={self.width} is not divisible by num_heads={self.num_heads}; give head_width.'
      )
    if self.num_heads % self._kv_heads:
      raise ValueError(
        f'Llama: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}.'
      )
    if (self.num_key_heads or self._kv_heads) % self._kv_heads:
      raise ValueError(
        f'Llama: num_key_heads={self.num_key_heads} is not a multiple of the {self._kv_heads} heads that are '
        f'cached.'
      )
    if self.attention_bias not in (False, True, 'qkv'):
      raise ValueError(
        f"Llama: attention_bias={self.attention_bias!r}; choose False, True or 'qkv'."
      )
    if self._head_width % 2:
      raise ValueError(f'Llama: a head of {self._head_width} channels cannot be rotated in pairs.')
    super().__post_init__()

  @property
  def _kv_heads(self) -> int:
    return self.num_kv_heads or self.num_heads

  @property
  def _head_width(self) -> int:
    return self.head_width or self.width // self.num_heads

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
    causal_attention.check_tokens('Llama', tokens, None, mask)
    context = causal_attention.make_context(self, tokens, mask)
    dtypes = (self.dtype, self.param_dtype)
    embed = Embed(
      self.vocab_size,
      self.width,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      embedding_init=vit_normal,
      name='embed_tokens',
    )
    x = embed(tokens)
    block = nn.remat(LlamaBlock) if self.remat else LlamaBlock
    for index in range(self.depth):
      x = block(
        self.num_heads,
        self._kv_heads,
        self._head_width,
        self.hidden,
        self.rope_theta,
        self.rope_scaling,
        self.attention_bias,
        self.mlp_bias,
        self.epsilon,
        self.num_key_heads,
        self.cache_rotated,
        *dtypes,
        name=f'layers_{index}',
      )(x, context)
    x = _rms_norm(self.epsilon, dtypes, 'norm')(x)
    if self.tied:
      return embed.attend(x)
    return _dense(self.vocab_size, dtypes, 'lm_head')(x)

  def init_cache(self, batch: int, length: int | None = None) -> dict[str, PyTree]:
    """Returns an empty collection `'cache'` for `batch` sequences of up to `length` tokens, padding included.

    `model.apply({**variables, 'cache': cache}, tokens, mutable=['cache'])` appends `tokens` (a whole prompt,
    or the next token) and returns their logits and the new cache. To append more than `length` (default:
    `max_length`) is not noticed and gives wrong results.
    """
    blocks = [(f'layers_{index}', 'self_attn') for index in range(self.depth)]
    shape = (batch, length or self.max_length, self._kv_heads, self._head_width)
    return causal_attention.empty_cache(blocks, shape, self.dtype)


def _dense(features: int, dtypes: tuple, name: str, use_bias: bool = False) -> nn.Dense:
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


def _rms_norm(epsilon: float, dtypes: tuple, name: str) -> nn.RMSNorm:
  dtype, param_dtype = dtypes
  return nn.RMSNorm(epsilon=epsilon, dtype=dtype, param_dtype=param_dtype, name=name)
