"""Weight decay by groups of channels: later channels, which fewer widths use, decay less."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any


def group_slope(
  epoch: Array | float, alpha: float, warmup_epochs: float, full_epoch: float
) -> Array:
  """Returns the slope over groups: 0 before the warm-up's end, then linear to `alpha` at `full_epoch`.

  Args:
    epoch: may be traced.
    alpha: from `full_epoch` on.
    warmup_epochs: in which all groups are alike.
    full_epoch: half the training in the paper. At or before the warm-up's end there is no ramp.
  """
  epoch, ramp = jnp.asarray(epoch, jnp.float32), full_epoch - warmup_epochs
  share = (epoch - warmup_epochs) / ramp if ramp > 0 else jnp.float32(1)
  return jnp.where(epoch < warmup_epochs, 0.0, alpha * jnp.clip(share, 0, 1))


def group_decays(
  decay: float, slope: Array | float, bins: int = 8, kind: Literal['linear', 'exp'] = 'linear'
) -> Array:
  """Returns the factor of each group `[bins]`: `decay (1 - slope i)`, or `decay slope^i` ('exp').

  With a slope of 0 all groups have `decay`, in both kinds.

  >>> print(group_decays(1.0, 0.05)[:3])
  [1.   0.95 0.9 ]
  """
  index = jnp.arange(bins)
  if kind == 'exp':
    return decay * jnp.where(jnp.asarray(slope) == 0, 1.0, jnp.power(slope, index))
  return decay * (1 - slope * index)


def group_regularizer(
  params: PyTree,
  decays: Array,
  *,
  skip: Sequence[str] = (),
) -> Array:
  """Returns `sum_params sum_elements decays[group] w^2`.

  The output channels (the last axis) of kernels with more than two axes, and the entries of vectors, are cut
  into as many groups as there are `decays`, of `channels // groups` each; the last one takes the rest (all,
  where there are fewer channels than groups). Matrices have `decays[0]`. The gradient is `2 decays w`: half
  of what is usually called weight decay.

  Args:
    params: a tree of arrays.
    decays: `[groups]`, see `group_decays`.
    skip: patterns of paths that are left out (a heads' parameters, a momentum encoder's).

  Returns:
    A scalar, float32 or wider.

  References:
    Cao et al., Three Guidelines You Should Know for Universally Slimmable Self-Supervised Learning, CVPR 2023
    (https://arxiv.org/abs/2303.06870), group regularization.

  >>> tree = {'scale': jnp.ones(4), 'kernel': jnp.ones((2, 2))}
  >>> float(group_regularizer(tree, jnp.array([1.0, 0.5])))
  7.0
  """
  decays = jnp.asarray(decays)
  total = jnp.zeros((), jnp.promote_types(decays.dtype, jnp.float32))
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if any(re.fullmatch(pattern, name) for pattern in skip):
      continue
    squares = jnp.square(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)))
    if leaf.ndim == 2:
      total = total + decays[0] * jnp.sum(squares)
      continue
    channels, groups = leaf.shape[-1], len(decays)
    size = channels // groups
    group = jnp.minimum(jnp.arange(channels) // size, groups - 1) if size else groups - 1
    total = total + jnp.sum(decays[group] * squares)
  return total
