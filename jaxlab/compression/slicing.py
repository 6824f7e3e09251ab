"""Carrying a plan out: masks over the whole network, and the smaller network itself."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab import models
from jaxlab.compression.plan import Plan, head_counts, renamed
from jaxlab.compression.structure import Cut, Structure, shrunk, structure
from jaxlab.models.intercept import Hook, Site
from jaxlab.models.normalization import masked_layer_normalize

Array = jax.Array
PyTree = Any

# Branches of a transformer's block, and the modules of the block that only they use.
BRANCHES = {'attention': ('norm1', 'ls1'), 'mlp': ('norm2', 'ls2')}


def slice_network(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  plan: Plan,
  *,
  same_scores: bool = True,
) -> tuple[nn.Module, dict[str, PyTree]]:
  """Returns the smaller network, of ordinary modules, and its variables.

  Every array of the whole network is cut along its groups' axes to the channels that stay; parts that are
  left out are gone, and the blocks behind them move up. The result computes what the masked network computes
  (`masked_apply` with `masks(model, plan)`), to rounding; but where a plan groups the channels of an
  attention anew (`plan.heads`), which masks do not, and without `same_scores`.

  Args:
    model: the whole network.
    variables: its collections; batch statistics are cut, too.
    plan: made for it.
    same_scores: scale the queries of attentions whose heads became narrower by `sqrt(new / old head width)`,
      so that scores, which are divided by the root of the head width, stay as they were. Without it the
      kernels are the whole network's bit for bit.

  Raises:
    ValueError: if the plan, or the variables, are of another network.

  >>> from jaxlab.compression import plan
  >>> from jaxlab.models import VGG
  >>> model = VGG((1, 1), (4, 8), hidden=None, num_classes=2)
  >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  >>> small, own = slice_network(model, variables, plan(model, {'conv1': [0, 2]}))
  >>> small.conv_widths, own['params']['blocks_1_0']['conv']['kernel'].shape
  ((2, 8), (3, 3, 2, 8))
  """
  found = plan.check(model)
  heads = head_counts(found, plan)
  flat = traverse_util.flatten_dict(dict(variables), sep='/')
  _check_sizes(found, flat)
  for name, indices in plan.keep.items():
    group = found.groups[name]
    for cut in group.cuts:
      if cut.path in flat:
        flat[cut.path] = _taken(flat[cut.path], cut, group.size, indices)
    if same_scores and group.scaled:
      ratio = (len(indices) / heads[name]) / (group.size / group.heads)
      for path, part, parts in group.scaled:
        if path in flat and ratio != 1:
          flat[path] = _scaled(flat[path], part, parts, math.sqrt(ratio))
  kept: dict[str, PyTree] = {}
  for path, leaf in flat.items():
    collection, own = path.split('/', 1)
    if (own := _without_norms(own, plan.drop)) is not None:
      kept[f'{collection}/{own}'] = leaf
  return sliced_model(model, plan), traverse_util.unflatten_dict(kept, sep='/')


def sliced_model(model: nn.Module, plan: Plan) -> nn.Module:
  """Returns the smaller network alone, without variables; see `slice_network`."""
  found = plan.check(model)
  sizes = {name: plan.kept_sizes[name] for name in found.groups}
  return shrunk(model, sizes, head_counts(found, plan), set(plan.drop))


def _without_norms(path: str, drop: Sequence[str]) -> str | None:
  """Returns the new name of an array; None where its module, or the branch behind its norm, is gone."""
  for part in drop:
    block, _, branch = part.rpartition('/')
    if any(path.startswith(f'{block}/{own}/') for own in BRANCHES.get(branch, ())):
      return None
  return renamed(path, drop)


def _check_sizes(found: Structure, flat: Mapping[str, Array]) -> None:
  """Raises ValueError for arrays that do not have a group's channels where they should be."""
  problems = []
  for name, group in found.groups.items():
    there = [cut for cut in group.cuts if cut.path in flat]
    if not there:
      problems.append(f'{name}: none of its arrays is there')
    for cut in there:
      if (size := jnp.shape(flat[cut.path])[cut.axis]) != group.size * cut.parts:
        problems.append(f'{cut.path}: {size} along axis {cut.axis}, not {group.size * cut.parts}')
  if problems:
    shown = '; '.join(problems[:4])
    raise ValueError(
      f'the variables are not those of this network, in {len(problems)} places: {shown}.'
    )


def _taken(leaf: Array, cut: Cut, size: int, indices: Sequence[int]) -> Array:
  where = (np.arange(cut.parts)[:, None] * size + np.asarray(indices)).reshape(-1)
  return jnp.take(leaf, where, axis=cut.axis)


def _scaled(leaf: Array, part: int, parts: int, factor: float) -> Array:
  """Returns an array with one of the equal parts of its last axis multiplied."""
  factors = np.ones((parts, leaf.shape[-1] // parts), np.float64)
  factors[part] = factor
  return leaf * jnp.asarray(factors.reshape(-1), leaf.dtype)


def masks(model: nn.Module, plan: Plan) -> dict[str, Array]:
  """Returns a plan as 0/1 masks for `masked_apply`: of groups that shrink and parts that are left out."""
  found = plan.check(model)
  by_group = {name: np.zeros(found.sizes[name], np.float32) for name in plan.keep}
  for name, indices in plan.keep.items():
    by_group[name][list(indices)] = 1
  return {name: jnp.asarray(own) for name, own in by_group.items()} | {
    part: jnp.zeros((), jnp.float32) for part in plan.drop
  }


def mask_variables(
  variables: Mapping[str, PyTree], masks: Mapping[str, Array], found: Structure
) -> dict[str, PyTree]:
  """Returns variables with zeros in place of the channels that masks take out.

  Every parameter that lies along a group's channels is multiplied by its mask. So what makes a channel, its
  bias and the scale and bias of the norm behind it included, makes zeros, and what reads it adds none.
  Statistics stay.

  Args:
    variables: of the whole network.
    masks: `[channels]` by group, 0 or 1; those of parts are passed over.
    found: the network's structure.
  """
  params = traverse_util.flatten_dict(dict(variables['params']), sep='/')
  for name, mask in masks.items():
    for cut in found.groups[name].cuts if name in found.groups else ():
      collection, path = cut.path.split('/', 1)
      if collection == 'params' and path in params:
        leaf = params[path]
        tiled = jnp.tile(mask.astype(leaf.dtype), cut.parts)
        params[path] = leaf * tiled.reshape(-1, *(1,) * (-cut.axis - 1))
  return {**variables, 'params': traverse_util.unflatten_dict(params, sep='/')}


def masked(
  model: nn.Module, variables: Mapping[str, PyTree], masks: Mapping[str, Array]
) -> tuple[dict[str, PyTree], list[Hook]]:
  """Returns variables and hooks with which a network runs without what masks take out.

  With these `masked_apply` calls it. `models.capture(model, variables, patterns, ..., hooks=hooks)` sees what
  its modules hand on then; a block that is taken out hands on its input.

  Args:
    model: the whole network.
    variables: its collections.
    masks: see `masked_apply`.

  Raises:
    ValueError: for masks of no group or part, or of another shape.
  """
  found, own = structure(model), []
  shapes = {name: (size,) for name, size in found.sizes.items()} | dict.fromkeys(found.parts, ())
  stored: dict[tuple[str, ...], Array] = {}
  for name, mask in masks.items():
    if name not in shapes:
      raise ValueError(f'masks: {name!r} is no group and no part of this {type(model).__name__}.')
    if jnp.shape(mask) != shapes[name]:
      raise ValueError(f'masks[{name!r}] has shape {jnp.shape(mask)}, expected {shapes[name]}.')
    if name in found.parts:
      stored[(*name.split('/'), 'stays')] = mask
      branch = name.rsplit('/', 1)[-1] in BRANCHES
      own.append(Hook(re.escape(name), call=_branch if branch else _block, collection='masks'))
    else:
      for norm in found.groups[name].norms:
        stored[(*norm.split('/'), 'mask')] = mask
        own.append(Hook(re.escape(norm), call=_masked_norm, collection='masks'))
  given = mask_variables(variables, masks, found)
  if stored:
    given['masks'] = traverse_util.unflatten_dict(stored)
  return given, own


def masked_apply(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  masks: Mapping[str, Array],
  *args: Any,
  hooks: Sequence[Hook] = (),
  **kwargs: Any,
) -> Any:
  """Returns what a network computes without the channels and parts that masks take out.

  Shapes stay, so that one compiled function serves all masks, under `jit`, `vmap` and `grad`. A channel that
  is taken out is 0 wherever it is read, and layer normalizations over it take their moments over those that
  stay. A block that is taken out hands its input on, a branch adds nothing.

  Args:
    model: the whole network.
    variables: its collections.
    masks: by group `[channels]`, by part `[]`; 0 takes out, 1 leaves. What is not named stays.
    *args: passed to the network.
    hooks: further hooks, within those of the masks.
    **kwargs: passed to `models.apply`.

  Raises:
    ValueError: for masks of no group or part, or of another shape.
  """
  given, own = masked(model, variables, masks)
  return models.apply(model, given, *args, hooks=[*hooks, *own], **kwargs)


def _masked_norm(site: Site, call: Any, x: Array) -> Array:
  del call
  scale, bias = (site.module.scope.get_variable('params', name) for name in ('scale', 'bias'))
  dtype = site.module.dtype or jnp.result_type(x, scale, bias)
  y = masked_layer_normalize(x, scale, bias, site.read('mask'), site.module.epsilon)
  return y.astype(dtype)


def _block(site: Site, call: Any, x: Array, *args: Any, **kwargs: Any) -> Array:
  return jnp.where(site.read('stays') > 0, call(x, *args, **kwargs), x)


def _branch(site: Site, call: Any, *args: Any, **kwargs: Any) -> Array:
  y = call(*args, **kwargs)
  return jnp.where(site.read('stays') > 0, y, jnp.zeros_like(y))
