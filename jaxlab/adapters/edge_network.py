"""The network of an edge device, MIST's LAE (Tang et al., CVPR 2025, arXiv 2406.17559): low-rank attention.

It reads features that were gathered elsewhere (`gather_sum`) and knows no backbone; nothing here loads
`jaxlab.models`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.adapters.low_rank_modules import (
  Module,
  init_head,
  init_low_rank_attention,
  init_modules,
  low_rank_attention,
  run_modules,
  token_logits,
)

Array = jax.Array
PyTree = Any


def init_edge_network(
  key: Array,
  width: int,
  num_classes: int,
  *,
  rank: int = 16,
  depth: int = 4,
  init: Callable[[Array, int, int], dict[str, PyTree]] = init_low_rank_attention,
) -> dict[str, PyTree]:
  """Draws an edge network: a linear probe on the normalized mean patch at first.

  Args:
    key: typed.
    width: channels of a token.
    num_classes: of the head.
    rank: of each attention (inferred, as the depth).
    depth: number of modules; 0: a linear probe.
    init: `(key, width, rank) -> parameters` of a module; `init_low_rank_mlp` for the baseline.

  Returns:
    `modules` (see `init_modules`), `norm` (`scale` 1 and `bias` 0: trained, for the sum of layers has
    another scale than the frozen network's own norm is made for; inferred, as is the pooling) and `head`.

  Raises:
    ValueError: for a rank or a number of classes below 1, or a negative depth.
  """
  if depth < 0:
    raise ValueError(f'depth={depth}: expected at least 0.')
  module_key, head_key = jax.random.split(key)
  norm = {'scale': jnp.ones((width,), jnp.float32), 'bias': jnp.zeros((width,), jnp.float32)}
  modules = init_modules(module_key, width, rank, depth, init=init) if depth else {}
  return {'modules': modules, 'norm': norm, 'head': init_head(head_key, width, num_classes)}


def apply_edge_network(
  edge: Mapping[str, PyTree],
  gathered: ArrayLike,
  *,
  pool: str = 'mean_patches',
  num_prefix_tokens: int = 1,
  remat: bool = False,
  module: Module = low_rank_attention,
  epsilon: float = 1e-6,
) -> Array:
  """Returns logits `[batch, num_classes]` of gathered features.

    x_0 = s;  x_t = x_{t-1} + module_t(x_{t-1});  head(LayerNorm(mean of x_L's patches))

  Args:
    edge: see `init_edge_network`.
    gathered: s, `[batch, tokens, width]` of any floating type; sums are in at least float32.
    pool: see `pool_tokens`, as `num_prefix_tokens`.
    num_prefix_tokens: tokens before the patches.
    remat: see `run_modules`.
    module: what it consists of; `low_rank_mlp` for the baseline.
    epsilon: of the LayerNorms.

  Raises:
    ValueError: see `pool_tokens`.
  """
  s = jnp.asarray(gathered)
  x = s.astype(jnp.promote_types(s.dtype, jnp.float32))
  x = x + run_modules(edge['modules'], x, module=module, epsilon=epsilon, remat=remat)
  return token_logits(
    edge['head'], edge['norm'], x, pool=pool, num_prefix_tokens=num_prefix_tokens, epsilon=epsilon
  )


def multiply_adds(tokens: int, width: int, rank: int, depth: int = 1) -> int:
  """Returns the multiply-adds of `depth` low-rank attentions for an image, `4 T d r + 2 T T r` each.

  >>> multiply_adds(197, 768, 16)
  10924832
  """
  return depth * (4 * tokens * width * rank + 2 * tokens * tokens * rank)
