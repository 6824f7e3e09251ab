"""LAST (Tang et al. 2024, arXiv 2402.04009): low-rank attention on the side of a frozen transformer.

The frozen network's weights and its outputs stay: it only hands on the tokens behind its blocks, and no
gradient goes back into it. `collect_features` takes these tokens; `apply_attention_side_network` learns from
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.adapters.low_rank_modules import (
  Module,
  init_low_rank_attention,
  init_modules,
  low_rank_attention,
  require_same_shape,
  run_modules,
)

Array = jax.Array
PyTree = Any

COMBINE = ('before', 'after')
CORRECTIONS = ('running', 'literal', 'none')


def init_attention_side_network(
  key: Array,
  width: int,
  depth: int,
  *,
  rank: int = 4,
  gap: int = 1,
  modules: int = 4,
  init: Callable[[Array, int, int], dict[str, PyTree]] = init_low_rank_attention,
) -> dict[str, PyTree]:
  """Draws a side network next to a transformer: its tokens are those of the transformer at first.

  The paper gives 0.66 M numbers for a ViT-B/16. With LayerNorms counted these are 48 modules of rank 4, so
  the defaults (their split over 12 blocks is inferred).

  Args:
    key: typed.
    width: channels of a token.
    depth: blocks of the transformer.
    rank: of each attention.
    gap: blocks of the transformer to one of the side network; divides `depth`.
    modules: low-rank attentions of each block of the side network.
    init: `(key, width, rank) -> parameters` of a module; `init_low_rank_mlp` for the baseline.

  Returns:
    `blocks_0` ... of `modules_0` ...

  Raises:
    ValueError: for a gap that does not divide `depth`, and numbers below 1.
  """
  groups = num_groups(depth, gap)
  keys = jax.random.split(key, groups)
  return {
    f'blocks_{i}': init_modules(own, width, rank, modules, init=init) for i, own in enumerate(keys)
  }


def num_groups(depth: int, gap: int) -> int:
  """Returns the groups of `gap` consecutive blocks; raises ValueError where `gap` does not divide."""
  if depth < 1 or gap < 1 or depth % gap:
    raise ValueError(f'gap={gap} does not divide the depth={depth} blocks into groups.')
  return depth // gap


def apply_attention_side_network(
  side: Mapping[str, PyTree],
  features: Sequence[ArrayLike],
  *,
  combine: Literal['before', 'after'] = 'before',
  correction: Literal['running', 'literal', 'none'] = 'running',
  remat: bool = False,
  module: Module = low_rank_attention,
  epsilon: float = 1e-6,
) -> Array:
  """Returns the tokens that a side network makes of a frozen transformer's.

    u_0 = z_0;  u_i = F_i(u_{i-1} + z_i);  y = u_m - (z_0 + ... + z_{m-1})

  `F_i` adds what its modules find, D_i, so that `y = z_m + D_1 + ... + D_m`: the transformer's last tokens
  and what was learned. No gradient goes to `features`. Sums are in at least float32.

  Args:
    side: see `init_attention_side_network`.
    features: `z_0` ... `z_m`, `[batch, tokens, width]` each, of m blocks; see `collect_features`.
    combine: 'before': a block sees the sum of the state and its own features (where the sum is taken is
      inferred); 'after': `u_i = F_i(u_{i-1}) + z_i`, so that the last block never sees the last features.
    correction: 'running': y as `z_m` and the sum of what was learned; 'literal': the subtraction, which
      cancels large sums of alike size, for comparison; 'none': `u_m`, the baseline without correction.
    remat: keep only the modules' inputs for the backward pass, and compute the rest again.
    module: what the blocks consist of; `low_rank_mlp` for the baseline.
    epsilon: of the LayerNorms.

  Returns:
    `[batch, tokens, width]`, in at least float32.

  Raises:
    ValueError: for features that are not one more than blocks, or of several shapes; another `combine` or
      `correction`.
  """
  if combine not in COMBINE or correction not in CORRECTIONS:
    raise ValueError(
      f'combine={combine!r}, correction={correction!r}: expected one of {COMBINE} and of {CORRECTIONS}.'
    )
  if len(features) != len(side) + 1:
    raise ValueError(
      f"{len(features)} features for {len(side)} blocks: expected {len(side) + 1}, the first block's input "
      'and what is behind each.'
    )
  wide = [jax.lax.stop_gradient(jnp.asarray(z)) for z in features]
  require_same_shape(wide)
  wide = [z.astype(jnp.promote_types(z.dtype, jnp.float32)) for z in wide]
  first, *rest = wide
  state, learned = first, jnp.zeros_like(first)
  for i, z in enumerate(rest):
    seen = state + z if combine == 'before' else state
    delta = run_modules(side[f'blocks_{i}'], seen, module=module, epsilon=epsilon, remat=remat)
    state, learned = state + z + delta, learned + delta
  if correction == 'running':
    return rest[-1] + learned
  return state - sum(wide[:-1]) if correction == 'literal' else state
