"""Low-rank attention: what side and edge networks are made of, and the MLP that it is compared with.

A module reads tokens and returns what it adds to them. This file loads no network of `jaxlab.models`: a
device that trains on features alone runs it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Array = jax.Array
PyTree = Any
Module = Callable[..., Array]


def normalize_tokens(
  norm: Mapping[str, ArrayLike], x: ArrayLike, *, epsilon: float = 1e-6
) -> Array:
  """Returns `(x - mean) / sqrt(variance + epsilon) * scale + bias` over the last axis, in at least float32.

  Args:
    norm: `scale` and `bias`, `[width]`.
    x: `[..., width]`.
    epsilon: added to the biased variance.

  >>> norm = {'scale': jnp.ones(2), 'bias': jnp.zeros(2)}
  >>> normalize_tokens(norm, jnp.array([[1.0, 3.0]])).round(3).tolist()
  [[-1.0, 1.0]]
  """
  x = jnp.asarray(x)
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  centered = x - jnp.mean(x, -1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centered), -1, keepdims=True) + epsilon)
  return centered * inverse * norm['scale'] + norm['bias']


def low_rank_attention(
  params: Mapping[str, PyTree], x: ArrayLike, *, epsilon: float = 1e-6
) -> Array:
  """Returns what low-rank self-attention adds to tokens.

    n = LayerNorm(x);  softmax((n query) (n key)^T / sqrt(rank)) (n value) out

  One head of width rank, over all tokens, the class token among them; no mask, no position bias, no biases
  in the projections (one head, the square root and the missing biases are inferred). Projections are in the
  parameters' type; the norm and the softmax in at least float32.

  Args:
    params: `norm` (`scale`, `bias` `[width]`), `query`, `key`, `value` `[width, rank]`, `out`
      `[rank, width]`; see `init_low_rank_attention`.
    x: `[batch, tokens, width]`.
    epsilon: of the LayerNorm (inferred).

  Returns:
    `[batch, tokens, width]` in the parameters' type, without the shortcut.

  References:
    Tang et al., Low-rank Attention Side-Tuning, 2024 (https://arxiv.org/abs/2402.04009), section 4.
  """
  query, key, value, out = (params[name] for name in ('query', 'key', 'value', 'out'))
  n = normalize_tokens(params['norm'], x, epsilon=epsilon).astype(query.dtype)
  scores = jnp.einsum('...qr,...kr->...qk', n @ query, n @ key)
  wide = jnp.promote_types(scores.dtype, jnp.float32)
  weights = jax.nn.softmax(scores.astype(wide) / math.sqrt(query.shape[-1]), axis=-1)
  return (weights.astype(query.dtype) @ (n @ value)) @ out


def low_rank_mlp(params: Mapping[str, PyTree], x: ArrayLike, *, epsilon: float = 1e-6) -> Array:
  """Returns what a thin MLP adds to tokens, `gelu(LayerNorm(x) down) up`: the baseline of the attention.

  Args:
    params: `norm`, `down` `[width, hidden]`, `up` `[hidden, width]`; see `init_low_rank_mlp`.
    x: `[..., width]`.
    epsilon: of the LayerNorm.

  Returns:
    Like `x`, in the parameters' type, without the shortcut.
  """
  n = normalize_tokens(params['norm'], x, epsilon=epsilon).astype(params['down'].dtype)
  return jax.nn.gelu(n @ params['down'], approximate=False) @ params['up']


def init_low_rank_attention(key: Array, width: int, rank: int) -> dict[str, PyTree]:
  """Draws a module of `low_rank_attention` that adds nothing at first: 4 width rank + 2 width numbers.

  Args:
    key: typed.
    width: channels of a token.
    rank: at least 1; `width` is attention of full rank.

  Returns:
    `query`, `key`, `value` uniform within +-1/sqrt(width), `out` zeros, the norm's `scale` 1 and `bias` 0
    (all inferred).

  Raises:
    ValueError: for a rank below 1.
  """
  _require_positive(rank=rank)
  names = ('query', 'key', 'value')
  drawn = {
    name: _uniform(own, width, rank)
    for name, own in zip(names, jax.random.split(key, 3), strict=True)
  }
  return {'norm': _init_norm(width), **drawn, 'out': jnp.zeros((rank, width), jnp.float32)}


def init_low_rank_mlp(key: Array, width: int, rank: int) -> dict[str, PyTree]:
  """Draws a module of `low_rank_mlp` that adds nothing at first, of as many numbers as attention has.

  Args:
    key: typed.
    width: channels of a token.
    rank: of the attention that it is compared with; the MLP has 2 rank hidden channels.

  Raises:
    ValueError: for a rank below 1.
  """
  _require_positive(rank=rank)
  return {
    'norm': _init_norm(width),
    'down': _uniform(key, width, 2 * rank),
    'up': jnp.zeros((2 * rank, width), jnp.float32),
  }


def init_modules(
  key: Array,
  width: int,
  rank: int,
  depth: int,
  *,
  init: Callable[[Array, int, int], dict[str, PyTree]] = init_low_rank_attention,
) -> dict[str, PyTree]:
  """Draws modules that run one after another, `modules_0`, `modules_1`, ...; see `run_modules`.

  Args:
    key: typed.
    width: channels of a token.
    rank: of each.
    depth: number of modules.
    init: `(key, width, rank) -> parameters` of one.

  Raises:
    ValueError: for a rank or a depth below 1.
  """
  _require_positive(rank=rank, depth=depth)
  keys = jax.random.split(key, depth)
  return {f'modules_{i}': init(own, width, rank) for i, own in enumerate(keys)}


def run_modules(
  modules: Mapping[str, PyTree],
  x: ArrayLike,
  *,
  module: Module = low_rank_attention,
  epsilon: float = 1e-6,
  remat: bool = False,
) -> Array:
  """Returns what modules in a row add to tokens: each reads `x` and all that those before it added.

  Args:
    modules: see `init_modules`.
    x: `[batch, tokens, width]`.
    module: `(parameters, x, epsilon=) -> what it adds`.
    epsilon: of the LayerNorms.
    remat: keep only the modules' inputs for the backward pass, and compute the rest again.

  Returns:
    The sum of what the modules add, without `x`, in at least float32.
  """
  call = functools.partial(module, epsilon=epsilon)
  call = jax.checkpoint(call) if remat else call
  x = jnp.asarray(x)
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  added = jnp.zeros_like(x)
  for i in range(len(modules)):
    added = added + call(modules[f'modules_{i}'], x + added)
  return added


def init_head(key: Array, width: int, num_classes: int) -> dict[str, Array]:
  """Draws a linear classifier: `kernel` `[width, num_classes]`, normal of deviation 0.02, `bias` zeros.

  Raises:
    ValueError: for fewer than 1 class.
  """
  _require_positive(num_classes=num_classes)
  kernel = 0.02 * jax.random.normal(key, (width, num_classes), jnp.float32)
  return {'kernel': kernel, 'bias': jnp.zeros((num_classes,), jnp.float32)}


def pool_tokens(
  norm: Mapping[str, ArrayLike],
  tokens: ArrayLike,
  *,
  pool: str = 'mean_patches',
  num_prefix_tokens: int = 1,
  epsilon: float = 1e-6,
) -> Array:
  """Returns what a head reads of tokens: `LayerNorm(mean of the patches)`, or of the class token.

  Pooling comes before the norm, as in DTL's code; that it is the same here is inferred.

  Args:
    norm: `scale` and `bias` `[width]`: those of the frozen network's last norm, or trained ones.
    tokens: `[batch, tokens, width]`.
    pool: 'mean_patches' (all but the prefix), or 'cls' (the first token).
    num_prefix_tokens: tokens before the patches.
    epsilon: of the LayerNorm.

  Returns:
    `[batch, width]`, in at least float32.

  Raises:
    ValueError: for another pooling, or a token that is not there.
  """
  tokens = jnp.asarray(tokens)
  if pool not in ('mean_patches', 'cls'):
    raise ValueError(f"pool={pool!r}: expected 'mean_patches' or 'cls'.")
  if not 0 <= num_prefix_tokens < tokens.shape[-2]:
    raise ValueError(
      f'num_prefix_tokens={num_prefix_tokens}: of {tokens.shape[-2]} tokens no patch is left.'
    )
  if pool == 'cls' and not num_prefix_tokens:
    raise ValueError("pool='cls' with num_prefix_tokens=0: there is no class token.")
  tokens = tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32))
  pooled = tokens[..., 0, :] if pool == 'cls' else jnp.mean(tokens[..., num_prefix_tokens:, :], -2)
  return normalize_tokens(norm, pooled, epsilon=epsilon)


def token_logits(
  head: Mapping[str, ArrayLike],
  norm: Mapping[str, ArrayLike],
  tokens: ArrayLike,
  **options: Any,
) -> Array:
  """Returns the logits of tokens, `pooled kernel + bias`, in at least float32.

  Args:
    head: `kernel` `[width, num_classes]` and `bias`; see `init_head`.
    norm: see `pool_tokens`, as the others.
    tokens: `[batch, tokens, width]`.
    **options: of `pool_tokens`.

  Raises:
    ValueError: see `pool_tokens`.
  """
  return pool_tokens(norm, tokens, **options) @ head['kernel'] + head['bias']


def require_same_shape(features: Sequence[Array]) -> tuple[int, ...]:
  """Returns the shape of all features; raises ValueError if they differ, or there are none."""
  shapes = [tuple(z.shape) for z in features]
  if not shapes or any(shape != shapes[0] for shape in shapes):
    raise ValueError(
      f'features have shapes {", ".join(map(str, shapes)) or "none"}: expected some, all of one shape; '
      'networks whose stages differ in width or resolution do not have them.'
    )
  return shapes[0]


def _init_norm(width: int) -> dict[str, Array]:
  return {'scale': jnp.ones((width,), jnp.float32), 'bias': jnp.zeros((width,), jnp.float32)}


def _uniform(key: Array, width: int, outputs: int) -> Array:
  bound = 1 / math.sqrt(width)
  return jax.random.uniform(key, (width, outputs), jnp.float32, -bound, bound)


def _require_positive(**values: int) -> None:
  if wrong := [f'{name}={value}' for name, value in values.items() if value < 1]:
    raise ValueError(f'{", ".join(wrong)}: expected at least 1.')
