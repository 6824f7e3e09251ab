"""LoRA (Hu et al. 2022, arXiv 2106.09685): products of two thin matrices next to frozen kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxlab.adapters._trees import at_paths, leaf_at
from jaxlab.models.initializers import torch_default
from jaxlab.models.intercept import Hook, Site, any_of

Array = jax.Array
PyTree = Any

COLLECTION = 'lora'


def init_lora(
  key: Array, params: Mapping[str, PyTree], layers: Sequence[str], rank: int
) -> dict[str, PyTree]:
  """Draws the matrices of LoRA: the network starts as it was.

  Args:
    key: typed.
    params: of the network, arrays or shapes.
    layers: paths of dense layers, kernels `[in, out]`: `blocks_0/attention/qkv`, ...
    rank: at least 1; 8 in most comparisons.

  Returns:
    The collection 'lora': for every layer `down` `[in, rank]`, uniform within +-1/sqrt(in), and `up`
    `[rank, out]`, zeros.

  Raises:
    ValueError: for a rank below 1, no layer, or one that has no kernel `[in, out]`.
  """
  if rank < 1:
    raise ValueError(f'rank={rank}: expected at least 1.')
  if isinstance(layers, str):
    raise ValueError(f'layers={layers!r}: expected a list of paths, got one text.')
  found = {}
  for path, own in zip(layers, jax.random.split(key, max(len(layers), 1))):
    kernel = leaf_at(params, path, 'kernel')
    if len(kernel.shape) != 2:
      raise ValueError(f'{path}: LoRA needs a kernel [in, out], got {kernel.shape}.')
    down = torch_default(own, (kernel.shape[0], rank), jnp.float32)
    found[path] = {'down': down, 'up': jnp.zeros((rank, kernel.shape[1]), jnp.float32)}
  return at_paths(found)


def lora_hooks(layers: Sequence[str], scale: float = 1.0, dropout: float = 0.0) -> tuple[Hook, ...]:
  """Returns hooks under which layers return `layer(x) + scale (x down) up`.

    models.apply(model, {'params': frozen, 'lora': trained}, x, hooks=lora_hooks(layers))

  Args:
    layers: as of `init_lora`.
    scale: alpha / rank of the paper; 1 where vision transformers are compared.
    dropout: of what `down` reads, from the rng stream 'dropout'; 0 in evaluation.

  Raises:
    ValueError: for a dropout outside of [0, 1).
  """
  if not 0 <= dropout < 1:
    raise ValueError(f'dropout={dropout}: expected a rate in [0, 1).')

  def call(site: Site, call: Any, x: Array, *args: Any, **kwargs: Any) -> Array:
    y, seen = call(x, *args, **kwargs), x
    if dropout:
      keep = jax.random.bernoulli(site.module.make_rng('dropout'), 1 - dropout, x.shape)
      seen = jnp.where(keep, x / (1 - dropout), 0)
    down, up = (site.read(name).astype(y.dtype) for name in ('down', 'up'))
    return y + scale * (seen.astype(y.dtype) @ down) @ up

  return (Hook(any_of(layers), call=call, collection=COLLECTION),)


def merge_lora(
  params: Mapping[str, PyTree], lora: Mapping[str, PyTree], scale: float = 1.0
) -> dict[str, PyTree]:
  """Returns parameters that need no hooks, `kernel + scale down up`.

  Args:
    params: of the network.
    lora: the collection of `init_lora`.
    scale: as of `lora_hooks`.

  Raises:
    ValueError: for a layer that `params` lacks or has with a kernel of another shape, and for no layer.
  """
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  held = traverse_util.flatten_dict(dict(lora), sep='/')
  layers = [layer for layer, _, name in (path.rpartition('/') for path in held) if name == 'down']
  if not layers:
    raise ValueError(f'lora has no layer with `down` and `up` to merge; got {sorted(held)[:8]}.')
  for layer in layers:
    kernel = leaf_at(params, layer, 'kernel')
    down, up = (leaf_at(lora, layer, name) for name in ('down', 'up'))
    if (*down.shape[:-1], *up.shape[-1:]) != kernel.shape or down.shape[-1:] != up.shape[-2:-1]:
      raise ValueError(
        f'{layer}: down is {down.shape}, up is {up.shape}: expected [in, rank] and [rank, out] for the '
        f'kernel {kernel.shape}.'
      )
    product = jnp.matmul(down, up, precision='highest')
    flat[f'{layer}/kernel'] = (kernel + scale * product).astype(kernel.dtype)
  return traverse_util.unflatten_dict(flat, sep='/')
