"""Decoders with fewer heads of keys and values: calibrated on their own caches, and converted.

"Effectively Compress KV Heads for LLM" (Yu et al. 2024, https://arxiv.org/abs/2406.07056), for `Llama` (and
Qwen2), `Bloom` and `GPT2`:

  grams = cache_grams(model, variables, batches, group_size=2)
  small = group_heads(model, variables, head_bases(model, grams))
  logits = models.apply(small.model, small.variables, tokens, hooks=small.hooks)

`weight_grams` in place of `cache_grams` is the baseline SVD-w, `pool_heads` that of mean pooling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.typing import ArrayLike

from jaxlab.compression.attention_layers import (
  AttentionLayers,
  AttentionLayout,
  Layer,
  attention_layout,
  read_layers,
  require_groups,
)
from jaxlab.compression.cache_grams import Grams
from jaxlab.compression.key_value_heads import (
  fold_keys,
  fold_values,
  group_basis,
  mean_pool_heads,
)
from jaxlab.compression.rotary_keys import (
  commuting_basis,
  expansion_arrays,
  expansion_hooks,
  projection_arrays,
  projection_hooks,
)
from jaxlab.models import Hook, abstract_variables

PyTree = Any
Rope = Literal['post', 'before', 'commuting', 'ignored']
ROPES: tuple[Rope, ...] = ('post', 'before', 'commuting', 'ignored')


class Bases(NamedTuple):
  """The directions that one attention keeps, `[groups, group_size * head_width, head_width]`."""

  key: np.ndarray
  value: np.ndarray


class GroupedHeads(NamedTuple):
  """A decoder with fewer heads of keys and values, whose `init_cache` is as much smaller.

  Attributes:
    model: of the same class.
    variables: with the collection `'hooks'`, where hooks read arrays.
    hooks: to apply it under, `models.apply(model, variables, tokens, hooks=hooks)`, and to generate.
  """

  model: nn.Module
  variables: dict[str, PyTree]
  hooks: tuple[Hook, ...] = ()


def head_bases(
  model: nn.Module, grams: Mapping[str, Grams], rope: Rope | None = None
) -> dict[str, Bases]:
  """Returns the directions that each attention keeps, one head's width of them a group.

  Args:
    model: `Llama`, `Bloom` or `GPT2`.
    grams: by path, of `cache_grams` or `weight_grams`.
    rope: as of `group_heads`: 'post' reads rotated keys, 'before' and 'ignored' those before the rotation.

  Raises:
    ValueError: for another model, or a way that the model does not have.

  Warns:
    UserWarning: if a group's cache has fewer directions than a head has channels.
  """
  layout = attention_layout(model)
  rope = _way(layout, rope)
  width, found = layout.head_width, {}
  for path in layout.paths:
    own = grams[path]
    if rope == 'commuting':
      key = commuting_basis(own.key, width)
    else:
      key = group_basis(own.key if rope in ('post', None) else own.unrotated_key, width)
    found[path] = Bases(key, group_basis(own.value, width))
  return found


def group_heads(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  bases: Mapping[str, Bases],
  rope: Rope | None = None,
) -> GroupedHeads:
  """Returns a decoder that caches one head of keys and values a group.

  Values are folded into their layer and the output's. Keys without rotary embedding are folded into their
  layer and the queries'. With rotary embedding there are these ways:

  - 'post' (strategy P): all keys are made and rotated, then projected and cached; queries likewise.
  - 'before' (B): keys are folded and cached without rotation; all that is cached is expanded and rotated at
    each step. The exact projection of keys before rotation, for reference.
  - 'commuting' (C): folded with a basis that commutes with rotations, plain grouped-query attention.
  - 'ignored': folded as if there were no rotation. Wrong, also with groups of one head; to be measured only.

  Args:
    model: `Llama`, `Bloom` or `GPT2`, also with grouped heads, whose groups then are of key-value heads.
    variables: of the model.
    bases: by the path of each attention, of `head_bases` for the same `rope`.
    rope: one of the above; None: 'post' with rotary embedding, else folded.

  Returns:
    `GroupedHeads` of NumPy parameters, of the kernels' dtypes.

  Raises:
    ValueError: for another model, a way that it does not have, bases of other shapes, or ones that do not
      commute with rotations under 'commuting'.

  References:
    Yu et al. 2024 (https://arxiv.org/abs/2406.07056). 'post' is inferred to be the paper's main way; it says
    that there is a special one. 'commuting' is not of the paper.
  """
  layout = attention_layout(model)
  rope, width = _way(layout, rope), layout.head_width
  read, group_size = read_layers(layout, variables), _group_size(layout, bases)
  new, arrays = {}, {}
  for path, layers in read.items():
    query, key, value, output = layers
    basis = bases[path]
    if rope == 'commuting' and not _commutes(basis.key, width):
      raise ValueError(
        f"{path}: the basis of the keys does not commute with rotations: use head_bases(..., 'commuting')."
      )
    folded = fold_values(value.kernel, output.kernel, basis.value, width, value_bias=value.bias)
    value = Layer(folded.cached, folded.cached_bias)
    output = Layer(folded.partner, output.bias)
    if found := _hook_arrays(layout, basis.key.astype(key.kernel.dtype), rope):
      arrays[path] = found
    if rope != 'post':
      folded = fold_keys(
        query.kernel, key.kernel, basis.key, width, query_bias=query.bias, key_bias=key.bias
      )
      key = Layer(folded.cached, folded.cached_bias)
      if rope != 'before':
        query = Layer(folded.partner, folded.partner_bias)
    new[path] = layout.write(AttentionLayers(query, key, value, output))
  small = _grouped(layout, group_size, rope)
  return GroupedHeads(small, _replaced(variables, new, arrays), _HOOKS.get(rope, ()))


def grouped_shapes(model: nn.Module, group_size: int, rope: Rope | None = None) -> GroupedHeads:
  """Returns what `group_heads` returns for groups of that size, with shapes in place of arrays.

  For compiling ahead: nothing is computed. Those of `pool_heads` are of rope='commuting', or of None
  without rotary embedding.

  Args:
    model: `Llama`, `Bloom` or `GPT2`.
    group_size: as of `cache_grams`.
    rope: as of `group_heads`.

  Raises:
    ValueError: as `group_heads`, and for a group size that does not divide.
  """
  layout = attention_layout(model)
  require_groups(layout, group_size)
  rope, width = _way(layout, rope), layout.head_width
  small = _grouped(layout, group_size, rope)
  variables = dict(abstract_variables(small))
  dtype = getattr(model, 'param_dtype', np.float32)
  basis = np.broadcast_to(
    np.zeros((), dtype), (layout.num_kv_heads // group_size, group_size * width, width)
  )
  arrays = jax.eval_shape(lambda: _hook_arrays(layout, basis, rope))
  if arrays:
    variables = _replaced(variables, {}, dict.fromkeys(layout.paths, arrays))
  return GroupedHeads(small, variables, _HOOKS.get(rope, ()))


def pool_heads(model: nn.Module, variables: Mapping[str, PyTree], group_size: int) -> GroupedHeads:
  """Returns a decoder whose heads of keys and values are the means of each group's, the baseline.

  Args:
    model: `Llama`, `Bloom` or `GPT2`.
    variables: of the model.
    group_size: as of `cache_grams`.

  Raises:
    ValueError: for another model, or a group size that does not divide.

  References:
    Ainslie et al., GQA, EMNLP 2023 (https://arxiv.org/abs/2305.13245).
  """
  layout = attention_layout(model)
  require_groups(layout, group_size)

  def pooled(layer: Layer) -> Layer:
    kernel, bias = (
      None if own is None else mean_pool_heads(own, layout.head_width, group_size) for own in layer
    )
    return Layer(kernel, bias)

  new = {}
  for path, layers in read_layers(layout, variables).items():
    key, value = pooled(layers.key), pooled(layers.value)
    new[path] = layout.write(layers._replace(key=key, value=value))
  return GroupedHeads(_grouped(layout, group_size, None), _replaced(variables, new, {}))


_HOOKS = {'post': projection_hooks(), 'before': expansion_hooks()}


def _hook_arrays(layout: AttentionLayout, basis: ArrayLike, rope: Rope | None) -> dict[str, PyTree]:
  """Returns what the hooks of a way read at one attention."""
  if rope == 'post':
    return projection_arrays(basis, layout.num_heads)
  return expansion_arrays(basis) if rope == 'before' else {}


def _grouped(layout: AttentionLayout, group_size: int, rope: Rope | None) -> nn.Module:
  fields = {'num_kv_heads': layout.num_kv_heads // group_size}
  fields |= {'num_key_heads': layout.num_kv_heads} if rope == 'post' else {}
  fields |= {'cache_rotated': False} if rope == 'before' else {}
  return layout.grouped(**fields)


def _way(layout: AttentionLayout, rope: Rope | None) -> Rope | None:
  if rope is not None and rope not in ROPES:
    raise ValueError(f'rope={rope!r}: expected one of {", ".join(map(repr, ROPES))}, or None.')
  if not layout.rotary and rope is not None:
    raise ValueError(f'rope={rope!r}: the model has no rotary embedding; leave rope out.')
  return 'post' if layout.rotary and rope is None else rope


def _group_size(layout: AttentionLayout, bases: Mapping[str, Bases]) -> int:
  """Returns the number of heads of a group; raises ValueError unless all bases are of one shape that fits."""
  if missing := [path for path in layout.paths if path not in bases]:
    raise ValueError(f'bases: there are none of {", ".join(missing)}.')
  shapes = {np.shape(basis) for path in layout.paths for basis in bases[path]}
  heads, width = layout.num_kv_heads, layout.head_width
  groups = next(iter(shapes))[0]
  if shapes != {(groups, heads // max(groups, 1) * width, width)} or heads % groups:
    raise ValueError(
      f'bases must all be [groups, {heads} / groups * {width}, {width}], of {heads} heads of {width} '
      f'channels in all; got {", ".join(map(str, sorted(shapes)))}.'
    )
  return heads // groups


def _commutes(basis: np.ndarray, width: int) -> bool:
  """Whether a basis maps pairs of channels by complex numbers alone."""
  pairs = basis.reshape(-1, 2, width // 2, 2, width // 2)
  own = np.einsum('japbp->jabp', pairs)
  same = np.allclose(own[:, 0, 0], own[:, 1, 1]) and np.allclose(own[:, 0, 1], -own[:, 1, 0])
  return bool(same and np.isclose(np.sum(own**2), np.sum(basis**2)))


def _replaced(
  variables: Mapping[str, PyTree], new: Mapping[str, PyTree], arrays: Mapping[str, PyTree]
) -> dict[str, PyTree]:
  """Returns variables with other parameters of some modules, and arrays of hooks."""

  def put(tree: PyTree, parts: Mapping[str, PyTree]) -> PyTree:
    flat = traverse_util.flatten_dict(dict(tree), sep='/')
    flat |= {
      f'{path}/{name}': leaf
      for path, own in parts.items()
      for name, leaf in traverse_util.flatten_dict(own, sep='/').items()
    }
    return traverse_util.unflatten_dict(flat, sep='/')

  found = {**variables, 'params': put(variables['params'], new)}
  return {**found, 'hooks': put(variables.get('hooks', {}), arrays)} if arrays else found
