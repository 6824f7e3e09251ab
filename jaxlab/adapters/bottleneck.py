"""Adapters: two thin layers behind the MLP of a frozen block, or next to it (AdaptFormer)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.adapters._trees import at_paths
from jaxlab.models.activations import GELUS
from jaxlab.models.anatomy import anatomy
from jaxlab.models.initializers import torch_default
from jaxlab.models.intercept import Hook, Site, any_of, intercepting, path_string

Array = jax.Array
PyTree = Any

COLLECTION = 'adapters'
_xavier = nn.initializers.xavier_uniform()


def init_adapters(key: Array, widths: Mapping[str, int], rank: int) -> dict[str, PyTree]:
  """Draws adapters that stand behind MLPs, as NOAH's code does: not the identity at first.

  Args:
    key: typed.
    widths: channels of each block by its path; see `block_widths`.
    rank: channels between both layers, at least 1; 8 in comparisons.

  Returns:
    The collection 'adapters': for every block `down` `[width, rank]` and `up` `[rank, width]`, Xavier
    uniform, `down_bias` and `up_bias`, normal with a deviation of 1e-6.

  Raises:
    ValueError: for a rank below 1, or no block.
  """
  found = {}
  for path, keys in _block_keys(key, widths, rank):
    width = widths[path]
    found[path] = {
      'down': _xavier(keys[0], (width, rank), jnp.float32),
      'up': _xavier(keys[1], (rank, width), jnp.float32),
      'down_bias': 1e-6 * jax.random.normal(keys[2], (rank,), jnp.float32),
      'up_bias': 1e-6 * jax.random.normal(keys[3], (width,), jnp.float32),
    }
  return at_paths(found)


def adapter_hooks(model: nn.Module) -> tuple[Hook, ...]:
  """Returns hooks under which each block's MLP branch u, behind drop path, is followed by an adapter.

    u + quick_gelu(u down + down_bias) up + up_bias

  Of networks whose blocks take the factors of drop path, `survival` `[2, batch]`, as second argument: the
  vision transformers of this library.

  Args:
    model: known to `models.anatomy`.

  Raises:
    ValueError: for a model without MLP branches.
  """
  outputs = _mlp_outputs(model)

  def call(site: Site, call: Callable, x: Array, survival: Array | None = None, **kwargs: Any):
    def adapted(inner: Site, u: Array) -> Array:
      del inner
      if survival is not None:
        u = u * survival[1].reshape(-1, *[1] * (u.ndim - 1)).astype(u.dtype)
      down, up, down_bias, up_bias = (
        site.read(name).astype(u.dtype) for name in ('down', 'up', 'down_bias', 'up_bias')
      )
      return u + GELUS['quick_gelu'](u @ down + down_bias) @ up + up_bias

    kept = None if survival is None else survival.at[1].set(1)
    # Within a part that runs by itself paths are the part's own.
    inside = path_string(site.module.path) + outputs[site.path].removeprefix(site.path)
    with intercepting([Hook(re.escape(inside), output=adapted)]):
      return call(x, kept, **kwargs)

  return (Hook(any_of(list(outputs)), call=call, collection=COLLECTION),)


def init_adaptformer(key: Array, widths: Mapping[str, int], rank: int) -> dict[str, PyTree]:
  """Draws the matrices of AdaptFormer: the network starts as it was.

  Args:
    key: typed.
    widths: channels of each block by its path; see `block_widths`.
    rank: channels between both layers, at least 1.

  Returns:
    The collection 'adapters': for every block `down` `[width, rank]`, uniform within +-1/sqrt(width), and
    `up` `[rank, width]`, zeros.

  Raises:
    ValueError: for a rank below 1, or no block.
  """
  found = {
    path: {
      'down': torch_default(keys[0], (widths[path], rank), jnp.float32),
      'up': jnp.zeros((rank, widths[path]), jnp.float32),
    }
    for path, keys in _block_keys(key, widths, rank)
  }
  return at_paths(found)


def adaptformer_hooks(model: nn.Module, scale: float = 0.1) -> tuple[Hook, ...]:
  """Returns hooks under which blocks add `scale relu(x down) up` to their outputs.

  x, which the MLP branch reads, is the residual stream between both branches, not normalized (hook point
  `residual`). Chen et al. 2022, arXiv 2205.13535, as the comparisons of vision transformers have it.

  Args:
    model: known to `models.anatomy`, with blocks of an attention and an MLP branch.
    scale: of what is added.

  Raises:
    ValueError: for a model without MLP branches.
  """
  paths = list(_mlp_outputs(model))

  def call(site: Site, call: Callable, *args: Any, **kwargs: Any):
    found: list[Array] = []

    def keep(inner: Site, x: Array) -> Array:
      del inner
      found.append(x)
      return x

    inside = '/'.join((*site.module.path, 'residual'))
    with intercepting([Hook(re.escape(inside), output=keep)]):
      y = call(*args, **kwargs)
    down, up = (site.read(name).astype(y.dtype) for name in ('down', 'up'))
    return y + scale * jax.nn.relu(found[-1].astype(y.dtype) @ down) @ up

  return (Hook(any_of(paths), call=call, collection=COLLECTION),)


def block_widths(model: nn.Module, x: Any) -> dict[str, int]:
  """Returns the channels of every block's output by its path, in order of execution; nothing is computed.

  Args:
    model: known to `models.anatomy`.
    x: its input, an array or a shape.

  >>> from jaxlab.models import create
  >>> model = create('vit_tiny_patch16_224', depth=2, image_size=32)
  >>> block_widths(model, jnp.zeros((1, 32, 32, 3)))
  {'blocks_0': 192, 'blocks_1': 192}
  """
  wanted, found = anatomy(model).block_paths, {}

  def keep(site: Site, y: Array) -> Array:
    found[site.path] = y.shape[-1]
    return y

  with intercepting([Hook(any_of(wanted), output=keep)]):
    jax.eval_shape(model.init, jax.random.key(0), x)
  return {path: found[path] for path in wanted}


def _block_keys(key: Array, widths: Mapping[str, int], rank: int):
  if rank < 1:
    raise ValueError(f'rank={rank}: expected at least 1.')
  keys = jax.random.split(key, (max(len(widths), 1), 4))
  return zip(widths, keys)


def _mlp_outputs(model: nn.Module) -> dict[str, str]:
  """Returns, by block, the module that returns what its MLP branch adds."""
  outputs = {
    block.path: branch.output
    for block in anatomy(model).blocks
    for branch in block.branches
    if branch.kind == 'mlp'
  }
  if not outputs:
    raise ValueError(f'{type(model).__name__} has no blocks with an MLP branch.')
  return outputs
