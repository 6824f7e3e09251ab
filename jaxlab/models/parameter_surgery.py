"""Module types of a network chosen by name, and transplanted or destroyed: Merge, Freeze, Destruction.

Three of the four tools of "Who Reasons in the Large Language Models?" (Shao & Wu, NeurIPS 2025,
https://arxiv.org/abs/2505.20993) that locate a capability in a network; the fourth, Delta, is in
`jaxlab.models.parameter_differences`. They take any pytree of named modules, and the state dict of a
checkpoint (`model.layers.3.self_attn.o_proj.weight`) as it is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.models.intercept import Hook, any_of, raise_unmatched
from jaxlab.models.lazy_checkpoints import LazyStateDict, LazyTensor
from jaxlab.trees import tree_paths

Array = jax.Array
PyTree = Any

_BLOCK = re.compile(r'(?:^|[/.])(?:layers|blocks|layer|h)[_/.](\d+)[/.](.+)')


def block_of(path: str) -> tuple[int, str] | None:
  """Returns the index of the block that a parameter lies in and its path there; None outside of blocks.

  Blocks are those of decoders and vision transformers, `layers_3`, `blocks_3`, `layer_3`, `h_3`, in Linen's
  notation or that of a checkpoint.

  >>> block_of('layers_3/self_attn/o_proj/kernel')
  (3, 'self_attn/o_proj/kernel')
  >>> block_of('model.layers.12.mlp.up_proj.weight')
  (12, 'mlp/up_proj/weight')
  >>> block_of('lm_head/kernel')
  """
  found = _BLOCK.search(path)
  return (int(found[1]), found[2].replace('.', '/')) if found else None


def select_parameters(
  params: PyTree,
  include: Sequence[str],
  exclude: Sequence[str] = (),
  blocks: Collection[int] | None = None,
) -> PyTree:
  """Returns which parameters belong to the chosen module types, as a pytree of Python bools.

  A type is a regular expression that must match a whole name on the parameter's path: 'o_proj' is every
  output projection (weight and bias), '.*proj' all seven projections of a Llama's block, 'mlp' all within an
  MLP, 'norm' the last norm alone, '.*norm' all of them.

  With tied embeddings there is no `lm_head`: 'embed_tokens' is the head, too, and 'lm_head' raises; `untied`
  makes two of them.

  Args:
    params: tree of named arrays, or a state dict (of a `LazyStateDict` its `shapes`).
    include: types that are chosen.
    exclude: types that are not, though included; e.g. `('patch_embed',)` for a ViT's 'proj'.
    blocks: indices of the blocks (`block_of`) that the choice is confined to, e.g. `range(5, 30)`; None:
      everywhere.

  Raises:
    ValueError: for a pattern without a match anywhere, a string in place of a list, indices of blocks that
      are not there, or a choice that is empty.

  References:
    Shao & Wu, 2025 (https://arxiv.org/abs/2505.20993), whose code matches substrings; there 'norm' as a
    whole name silently matches nothing.

  >>> params = {'layers_0': {'o_proj': {'kernel': 1}, 'norm': {'scale': 1}}, 'norm': {'scale': 1}}
  >>> select_parameters(params, ['o_proj', 'norm'], blocks=[0])
  {'layers_0': {'norm': {'scale': True}, 'o_proj': {'kernel': True}}, 'norm': {'scale': False}}
  """
  paths = [path for path, _ in tree_paths(params)]
  names = {path: re.split(r'[/.]', path) for path in paths}
  for argument, patterns in (('include', include), ('exclude', exclude)):
    if isinstance(patterns, str):
      raise ValueError(f'{argument} takes a list of patterns, got the string {patterns!r}.')
    unused = [p for p in patterns if not any(_matches([p], names[path]) for path in paths)]
    if 'lm_head' in unused and any('embed_tokens' in own for own in names.values()):
      raise ValueError(
        f"{argument}: 'lm_head' is not there, as the embedding is the head's weight, too: choose "
        "'embed_tokens', which changes both, or give each its own by untied(params)."
      )
    if unused:
      known = {name for parts in names.values() for name in parts}
      raise_unmatched(unused, sorted(known), argument, 'module')
  index = {path: found[0] for path in paths if (found := block_of(path))}
  if blocks is not None:
    depth = max(index.values(), default=-1) + 1
    wrong = sorted(set(blocks) - set(index.values()))
    if wrong or not len(blocks):
      raise ValueError(f'blocks={list(blocks)}: expected indices in [0, {depth}), got {wrong}.')
    inside = [path for path in paths if index.get(path) in blocks]
    unused = [p for p in include if not any(_matches([p], names[path]) for path in inside)]
    if unused:
      raise ValueError(f'include: {unused} match nothing within the blocks {list(blocks)}.')
  chosen = [
    _matches(include, names[path])
    and not _matches(exclude, names[path])
    and (blocks is None or index.get(path) in blocks)
    for path in paths
  ]
  if not any(chosen):
    raise ValueError(
      f'include={list(include)} without exclude={list(exclude)} chooses no parameter'
      + ('.' if blocks is None else f' of the blocks {list(blocks)}.')
    )
  return jax.tree.unflatten(jax.tree.structure(params), chosen)


def tuned_parameters(
  params: PyTree,
  types: Sequence[str] = (),
  always: Sequence[str] = ('.*norm', 'embed_tokens', 'lm_head'),
  blocks: Collection[int] | None = None,
) -> PyTree:
  """Returns which parameters the paper's Freeze trains: chosen types, all norms, embedding and head.

  Without embedding and head its training did not converge. Its variants are the types `()` (F1),
  `('o_proj',)` (F2), `('q_proj', 'k_proj', 'v_proj', 'o_proj')` (F3) and `('.*',)`, full tuning (F4):

    mask = tuned_parameters(params, ['o_proj'])
    optimizer = training.make_optimizer('adamw', 1e-5, frozen=unselected(mask))

  Args:
    params: tree of named arrays.
    types: chosen module types, patterns as in `select_parameters`.
    always: types that are trained anyway, in all blocks. With tied embeddings 'embed_tokens' is the head,
      too, and 'lm_head' is left out.
    blocks: that `types` are confined to; None: everywhere.

  Returns:
    A pytree of Python bools; all else is frozen, without gradient, state and weight decay.

  Raises:
    ValueError: as `select_parameters`, for a pattern that matches nothing.

  References:
    Shao & Wu, 2025 (https://arxiv.org/abs/2505.20993), tool Freeze and the authors' code.

  >>> params = {'embed_tokens': {'embedding': 1}, 'norm': {'scale': 1}}
  >>> params['layers_0'] = {'o_proj': {'kernel': 1}, 'q_proj': {'kernel': 1}}
  >>> tuned_parameters(params, ['o_proj'])['layers_0']
  {'o_proj': {'kernel': True}, 'q_proj': {'kernel': False}}
  """
  names = {name for path, _ in tree_paths(params) for name in re.split(r'[/.]', path)}
  if 'lm_head' not in names and 'embed_tokens' in always:
    always = [pattern for pattern in always if pattern != 'lm_head']
  masks = [select_parameters(params, always)] if always else []
  masks += [select_parameters(params, types, blocks=blocks)] if len(types) else []
  if not masks:
    raise ValueError('types and always are empty: nothing would be trained.')
  return jax.tree.map(lambda *chosen: any(chosen), *masks)


def unselected(mask: PyTree) -> tuple[str, ...]:
  """Returns patterns of exactly the parameters that a mask leaves out, for `make_optimizer(frozen=...)`.

  >>> unselected({'o_proj': {'kernel': True}, 'q_proj': {'kernel': False}})
  ('q_proj/kernel',)
  """
  return tuple(re.escape(path) for path, chosen in tree_paths(mask) if not chosen)


def untied(params: PyTree) -> PyTree:
  """Returns parameters whose head is a leaf of its own, at first the embedding; others as they are.

  Where a decoder's embedding is the head's weight, too (`Llama(tied=True)`), to merge, destroy or freeze one
  of the two changes both. `model.clone(tied=False)` computes the same with what is returned. Pairs of
  checkpoints of which one has a head of its own, as a distilled network may have, become comparable.

  Args:
    params: tree with `embed_tokens/embedding`, a state dict, or a `LazyStateDict` (which is not read).

  Raises:
    ValueError: if there is neither a head nor an embedding of the name.

  >>> untied({'embed_tokens': {'embedding': jnp.ones((5, 2))}})['lm_head']['kernel'].shape
  (2, 5)
  """
  if isinstance(params, LazyStateDict):
    return LazyStateDict(_with_head(params.tensors))
  if 'lm_head' in params:
    return params
  if 'embed_tokens' in params:
    return {**params, 'lm_head': {'kernel': jnp.asarray(params['embed_tokens']['embedding']).T}}
  return _with_head(params)


def _with_head(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  if 'lm_head.weight' in state_dict:
    return dict(state_dict)
  found = [name for name in state_dict if re.search(r'(^|\.)embed_tokens\.weight$', name)]
  if len(found) != 1:
    raise ValueError(f'expected lm_head or one embedding embed_tokens, got {len(found)} of these.')
  return {**state_dict, 'lm_head.weight': state_dict[found[0]]}


def merge_parameters(base: PyTree, tuned: PyTree, mask: PyTree, base_share: float = 0.0) -> PyTree:
  """Returns `base` with the chosen parameters of `tuned`: the paper's Merge, a transplant without training.

    w = base_share w_base + (1 - base_share) w_tuned  where chosen,  w_base elsewhere

  The inverse merge, all of `tuned` but a protected list, is `merge_parameters(tuned, base, protected)`.

  Checkpoints of any size are merged in the memory of a few tensors:

    base, tuned = (models.open_state_dict(folder) for folder in folders)
    mask = models.select_parameters(base.shapes, ['o_proj'])
    models.save_state_dict('merged', models.merge_parameters(base, tuned, mask))

  Args:
    base: parameters of one network; a `LazyStateDict` is not read.
    tuned: those of another of the same architecture, likewise.
    mask: of `select_parameters`.
    base_share: in [0, 1]; the paper's mixture has 0.5.

  Returns:
    The structure and dtypes of `base`; mixtures are taken in at least float32. A `LazyStateDict` if they are.

  Raises:
    ValueError: if names or shapes differ (naming the first), or for a share that is not in [0, 1].

  References:
    Shao & Wu, 2025 (https://arxiv.org/abs/2505.20993), tool Merge and the authors' code.

  >>> base, tuned = {'o': jnp.zeros(2), 'q': jnp.zeros(2)}, {'o': jnp.ones(2), 'q': jnp.ones(2)}
  >>> {k: v.tolist() for k, v in merge_parameters(base, tuned, {'o': True, 'q': False}).items()}
  {'o': [1.0, 1.0], 'q': [0.0, 0.0]}
  """
  if not 0 <= base_share <= 1:
    raise ValueError(f'base_share must be in [0, 1], got {base_share}.')
  lazy = isinstance(base, LazyStateDict), isinstance(tuned, LazyStateDict)
  if any(lazy):
    if not all(lazy):
      raise ValueError('base and tuned must both be LazyStateDicts, or neither.')
    return _merge_lazily(base, tuned, mask, base_share)
  require_same_architecture(base=base, tuned=tuned)
  _require_mask(base, mask)

  def leaf(chosen: bool, a: Array, b: Array) -> Array:
    if not chosen:
      return a
    a, b = jnp.asarray(a), jnp.asarray(b)
    wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    mixed = (
      b if base_share == 0 else base_share * a.astype(wide) + (1 - base_share) * b.astype(wide)
    )
    return mixed.astype(a.dtype)

  return jax.tree.map(leaf, mask, base, tuned)


def _merge_lazily(
  base: LazyStateDict, tuned: LazyStateDict, mask: Mapping[str, bool], base_share: float
) -> LazyStateDict:
  require_same_architecture(base=base.shapes, tuned=tuned.shapes)
  _require_mask(base.shapes, mask)

  def mixed(name: str, dtype: np.dtype) -> np.ndarray:
    new = tuned[name]
    if base_share:
      old = base[name]
      wide = jnp.promote_types(jnp.promote_types(old.dtype, new.dtype), jnp.float32)
      new = (1 - base_share) * new.astype(wide)
      new += base_share * old.astype(wide)
    return new.astype(dtype, copy=False)

  merged = {
    name: own._replace(read=functools.partial(mixed, name, own.dtype)) if mask[name] else own
    for name, own in base.tensors.items()
  }
  return LazyStateDict(merged)


def destroy_parameters(
  params: PyTree, mask: PyTree, key: Array | None = None, std: float = 0.02
) -> PyTree:
  """Returns `params` with the chosen ones destroyed: the paper's destructors Zero and ReInit.

  Zero (no key) sets them to 0, biases as well where the mask has them. Zeroed output projections add nothing
  to the stream, and zeroed queries or keys make attention the causal average. ReInit (with a key) draws
  entries from N(0, std^2). Its third destructor, Remove, is `remove_blocks`.

  Args:
    params: parameters of a network; a `LazyStateDict` is not read.
    mask: of `select_parameters`; the paper leaves early and late blocks alone: any damage there gives
      random tokens.
    key: of the random numbers; None: zeros.
    std: of the random entries.

  Returns:
    The structure, shapes, dtypes and shardings of `params`; a `LazyStateDict` if it is one.

  Raises:
    ValueError: if the mask's structure is another, or for a negative std.

  References:
    Shao & Wu, 2025 (https://arxiv.org/abs/2505.20993), tool Destruction.

  >>> destroyed = destroy_parameters({'o': jnp.ones(2), 'q': jnp.ones(2)}, {'o': True, 'q': False})
  >>> {k: v.tolist() for k, v in destroyed.items()}
  {'o': [0.0, 0.0], 'q': [1.0, 1.0]}
  """
  if not std >= 0:
    raise ValueError(f'std must not be negative, got {std}.')
  if isinstance(params, LazyStateDict):
    return _destroy_lazily(params, mask, key, std)
  _require_mask(params, mask)
  leaves, structure = jax.tree.flatten(params)
  out = []
  for index, (leaf, chosen) in enumerate(zip(leaves, jax.tree.leaves(mask))):
    if chosen and key is None:
      leaf = jnp.zeros_like(leaf)
    elif chosen:
      own, kind = jax.random.fold_in(key, index), jnp.result_type(leaf)
      place = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, 'sharding', None)
      if isinstance(place, jax.sharding.NamedSharding):  # each device draws its part
        leaf = _drawing_over(jnp.shape(leaf), kind, place)(own, std)
      else:
        leaf = _drawn(own, std, jnp.shape(leaf), kind)
    out.append(leaf)
  return jax.tree.unflatten(structure, out)


def _drawn(key: Array, std: float, shape: tuple[int, ...], dtype: Any) -> Array:
  return (std * jax.random.normal(key, shape)).astype(dtype)


@functools.lru_cache  # leaves of one form share a compilation
def _drawing_over(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Callable[..., Array]:
  return jax.jit(functools.partial(_drawn, shape=shape, dtype=dtype), out_shardings=sharding)


def _destroy_lazily(
  params: LazyStateDict, mask: Mapping[str, bool], key: Array | None, std: float
) -> LazyStateDict:
  _require_mask(params.shapes, mask)

  def made(index: int, own: LazyTensor) -> np.ndarray:
    if key is None:
      return np.zeros(own.shape, own.dtype)
    return np.asarray(_drawn(jax.random.fold_in(key, index), std, own.shape, own.dtype))

  places = {name: index for index, name in enumerate(sorted(params.tensors))}  # as in a tree
  destroyed = {
    name: own._replace(read=functools.partial(made, places[name], own)) if mask[name] else own
    for name, own in params.tensors.items()
  }
  return LazyStateDict(destroyed)


def remove_blocks(paths: Iterable[str]) -> Hook:
  """Returns the hook that skips whole blocks, `y = x`: the paper's destructor Remove, for `models.apply`.

  Args:
    paths: of modules that map their first argument to its own shape, e.g. `('layers_1', 'layers_2')`.

  Raises:
    ValueError: for no path at all; from `apply`, if none of the paths is there.

  References:
    Shao & Wu, 2025 (https://arxiv.org/abs/2505.20993), tool Destruction.

  >>> remove_blocks(['layers_1']).pattern
  'layers_1'
  """
  paths = tuple(paths)
  if not paths:
    raise ValueError('paths must name the blocks that are removed, got none.')

  def skip(site: Any, call: Any, x: Array, *_: Any, **__: Any) -> Array:
    del site, call
    return x

  return Hook(any_of(paths), call=skip)


def require_same_architecture(**trees: PyTree) -> None:
  """Raises ValueError, naming the first difference, unless two trees have the same names and shapes."""
  (first, a), (second, b) = trees.items()
  shapes, others = dict(tree_paths(a)), dict(tree_paths(b))
  for path in sorted(shapes.keys() | others.keys()):
    if path not in others or path not in shapes:
      there, missing = (first, second) if path in shapes else (second, first)
      raise ValueError(f'{path}: in {there}, missing in {missing}; expected one architecture.')
    if jnp.shape(shapes[path]) != jnp.shape(others[path]):
      raise ValueError(
        f'{path}: {first} has {jnp.shape(shapes[path])}, {second} {jnp.shape(others[path])}; expected '
        'one architecture.'
      )
  if jax.tree.structure(a) != jax.tree.structure(b):
    raise ValueError(f'{first} and {second} are trees of different containers.')


def _require_mask(params: PyTree, mask: PyTree) -> None:
  given, expected = jax.tree.structure(mask), jax.tree.structure(params)
  if given != expected:
    raise ValueError(f'mask must have the structure of the parameters, {expected}; got {given}.')


def _matches(patterns: Sequence[str], names: Sequence[str]) -> bool:
  return any(re.fullmatch(pattern, name) for pattern in patterns for name in names)
