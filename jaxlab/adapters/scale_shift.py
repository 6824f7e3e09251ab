"""SSF (Lian et al. 2022, arXiv 2210.08823): scales and shifts of channels behind every frozen operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from jaxlab.adapters._trees import at_paths, leaf_at
from jaxlab.models.anatomy import anatomy
from jaxlab.models.intercept import Hook, Site, any_of

Array = jax.Array
PyTree = Any

COLLECTION = 'ssf'


def ssf_modules(model: nn.Module, mergeable: Mapping[str, PyTree] | None = None) -> tuple[str, ...]:
  """Returns the paths behind which SSF scales and shifts: all layers and normalizations but for the head.

  Args:
    model: known to `models.anatomy`.
    mergeable: parameters; modules without a bias, into which `merge_ssf` could not put a shift (Swin's
      `reduction`), are left out; None: all.

  >>> from jaxlab.models import create
  >>> ssf_modules(create('vit_tiny_patch16_224', depth=1))[:3]
  ('patch_embed/proj', 'blocks_0/attention/qkv', 'blocks_0/attention/proj')
  """
  parts = anatomy(model)
  layers = [path for path in parts.layers if path not in parts.head]
  modules = (*layers, *(norm.path for norm in parts.norms))
  if mergeable is None:
    return modules
  flat = traverse_util.flatten_dict(dict(mergeable), sep='/')
  return tuple(path for path in modules if f'{path}/bias' in flat)


def init_ssf(key: Array, params: Mapping[str, PyTree], modules: Sequence[str]) -> dict[str, PyTree]:
  """Draws scales around 1 and shifts around 0, both with a deviation of 0.02.

  Args:
    key: typed.
    params: of the network, arrays or shapes.
    modules: paths of layers with a `kernel` and of normalizations with a `scale`; see `ssf_modules`.

  Returns:
    The collection 'ssf': for every module `scale` and `shift`, both `[channels]`.

  Raises:
    ValueError: for no module, or one without either.
  """
  found = {}
  for path, own in zip(modules, jax.random.split(key, max(len(modules), 1))):
    shape = _channels(params, path)
    noise = 0.02 * jax.random.normal(own, (2, *shape), jnp.float32)
    found[path] = {'scale': 1 + noise[0], 'shift': noise[1]}
  return at_paths(found)


def ssf_hooks(modules: Sequence[str]) -> tuple[Hook, ...]:
  """Returns hooks under which modules return `scale * module(x) + shift`; modules as of `init_ssf`."""

  def output(site: Site, y: Array) -> Array:
    return y * site.read('scale').astype(y.dtype) + site.read('shift').astype(y.dtype)

  return (Hook(any_of(modules), output=output, collection=COLLECTION),)


def merge_ssf(params: Mapping[str, PyTree], ssf: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Returns parameters that need no hooks: kernels or norms' scales times `scale`, biases then plus `shift`.

  Args:
    params: of the network.
    ssf: the collection of `init_ssf`.

  Raises:
    ValueError: for a module that `params` lacks or has with other channels, no module, or one without bias
      (Swin's `reduction`), which cannot take the shift: `ssf_modules(model, mergeable=params)` leaves these
      out.
  """
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  held = traverse_util.flatten_dict(dict(ssf), sep='/')
  scales = {path.rpartition('/')[0]: own for path, own in held.items() if path.endswith('/scale')}
  if not scales:
    raise ValueError(
      f'ssf has no module with `scale` and `shift` to merge; got {sorted(held)[:8]}.'
    )
  for module, scale in scales.items():
    weight = 'kernel' if f'{module}/kernel' in flat else 'scale'
    if f'{module}/{weight}' in flat and f'{module}/bias' not in flat:
      raise ValueError(
        f'{module!r} has no bias that could take the shift: leave it out of the modules '
        '(ssf_modules(model, mergeable=params)), or keep the hooks.'
      )
    bias = leaf_at(params, module, 'bias')
    kernel, shift = leaf_at(params, module, weight), leaf_at(ssf, module, 'shift')
    if not scale.shape == shift.shape == kernel.shape[-1:]:
      raise ValueError(
        f'{module}: scale is {scale.shape}, shift is {shift.shape}: expected {kernel.shape[-1:]}, the '
        f'channels of the {weight} {kernel.shape}.'
      )
    flat[f'{module}/{weight}'] = (kernel * scale).astype(kernel.dtype)
    flat[f'{module}/bias'] = (bias * scale + shift).astype(bias.dtype)
  return traverse_util.unflatten_dict(flat, sep='/')


def _channels(params: Mapping[str, PyTree], path: str) -> tuple[int]:
  """Returns the shape of a module's channels, the last axis of its kernel or scale."""
  try:
    return leaf_at(params, path, 'kernel').shape[-1:]
  except ValueError:
    return leaf_at(params, path, 'scale').shape[-1:]
