"""What can be cut out of vision transformers."""

from collections.abc import Mapping

from jaxlab.compression.structure import (
  Cut,
  Group,
  Structure,
  describe,
  made_by,
  of_norm,
  read_by,
  shrunk,
)
from jaxlab.models.pvt import PVT
from jaxlab.models.vit import ViT

_BRANCHES = ('attention', 'mlp')


def _branch(model: ViT | PVT, index: int, width: int, ratio: float) -> tuple[int, int]:
  """Returns the channels of a block's attention and MLP."""
  attention = model.attention_widths[index] if model.attention_widths else width
  hidden = model.hidden_widths[index] if model.hidden_widths else int(width * ratio)
  return attention, hidden


def _shares(path: str, kernel: str, parts: int) -> tuple[tuple[str, int, int], ...]:
  """Returns what scales the queries: the first part of a kernel's and bias's outputs."""
  return tuple((f'params/{path}/{kernel}/{name}', 0, parts) for name in ('kernel', 'bias'))


def _wide(path: str, kernel: str, parts: int) -> tuple[Cut, ...]:
  """Returns the cuts of a layer that makes several of a group's channels side by side."""
  return tuple(Cut(f'params/{path}/{kernel}/{name}', -1, parts) for name in ('kernel', 'bias'))


@describe.register
def _vit(model: ViT) -> Structure:
  if model.scan:
    raise ValueError(
      'What can be cut out of a ViT with scan=True is not known: unstack its blocks '
      '(models.unstack_blocks) and take scan=False.'
    )
  groups, parts = {}, []
  tables = ('pos_embed', 'cls_token', 'dist_token', 'reg_token')
  neck = [*(Cut(f'params/{name}') for name in tables), *made_by('patch_embed/proj')]
  norms = ['norm_pre', 'norm'] if model.pre_norm else ['norm']
  gated = model.activation == 'swiglu'
  for index in range(model.depth):
    path = f'blocks_{index}'
    attention, hidden = _branch(model, index, model.width, model.mlp_ratio)
    heads = model.attention_heads[index] if model.attention_heads else model.num_heads
    if attention:
      own = f'{path}/attention'
      cuts = (*_wide(own, 'qkv', 3), *read_by(f'{own}/proj'))
      groups[f'{own}/qkv'] = Group(attention, cuts, heads=heads, scaled=_shares(own, 'qkv', 3))
      neck += [*read_by(f'{own}/qkv'), *made_by(f'{own}/proj'), Cut(f'params/{path}/ls1/gamma')]
      norms.append(f'{path}/norm1')
    if hidden:
      own = f'{path}/mlp'
      halves = 2 if gated else 1
      cuts = (*_wide(own, 'fc1', halves), *read_by(f'{own}/fc2'))
      groups[f'{own}/fc1'] = Group(hidden // halves, cuts)
      neck += [*read_by(f'{own}/fc1'), *made_by(f'{own}/fc2'), Cut(f'params/{path}/ls2/gamma')]
      norms.append(f'{path}/norm2')
    there = [own for own, size in zip(_BRANCHES, (attention, hidden), strict=True) if size]
    parts += [path, *(f'{path}/{own}' for own in there)]
  neck += [cut for norm in norms for cut in of_norm(norm)]
  neck += read_by('head', 'head_dist')
  blocks = tuple(f'blocks_{index}' for index in range(model.depth))
  groups = {'neck': Group(model.width, tuple(neck), tuple(norms)), **groups}
  return Structure(groups, tuple(parts), (blocks,))


def _block_fields(
  paths: list[str], query: str, sizes: Mapping[str, int], gone: set[str], halves: int = 1
) -> dict[str, tuple[int, ...]]:
  """Returns the fields that say the widths of the blocks that are left."""

  def width(path: str, layer: str, factor: int) -> int:
    branch, _, _ = layer.rpartition('/')
    return 0 if f'{path}/{branch}' in gone else factor * sizes.get(f'{path}/{layer}', 0)

  kept = [path for path in paths if path not in gone]
  return {
    'attention_widths': tuple(width(path, f'attention/{query}', 1) for path in kept),
    'hidden_widths': tuple(width(path, 'mlp/fc1', halves) for path in kept),
  }


@shrunk.register
def _(model: ViT, sizes: Mapping[str, int], heads: Mapping[str, int], gone: set[str]) -> ViT:
  paths = [f'blocks_{index}' for index in range(model.depth)]
  kept = [path for path in paths if path not in gone]
  own_heads = [heads.get(f'{path}/attention/qkv') for path in kept]
  known = [own for own in own_heads if own]
  usual = known[0] if known else model.num_heads
  fields = _block_fields(paths, 'qkv', sizes, gone, 2 if model.activation == 'swiglu' else 1)
  if len(set(known)) > 1:
    fields['attention_heads'] = tuple(own or usual for own in own_heads)
  fields |= {'depth': len(kept), 'width': sizes['neck'], 'num_heads': usual}
  return model.clone(**{'attention_heads': None, **fields})


@describe.register
def _pvt(model: PVT) -> Structure:
  groups, parts, first = {}, [], 0
  for stage, depth in enumerate(model.depths):
    name, width = f'stages_{stage}', model.widths[stage]
    merge = f'{name}/downsample' if stage else 'patch_embed'
    neck, norms = [*made_by(f'{merge}/proj')], [f'{merge}/norm', f'{name}/norm']
    for index in range(depth):
      path = f'{name}/blocks_{index}'
      attention, hidden = _branch(model, first + index, width, model.mlp_ratios[stage])
      if attention:
        own = f'{path}/attention'
        cuts = (*made_by(f'{own}/q'), *_wide(own, 'kv', 2), *read_by(f'{own}/proj'))
        scaled = _shares(own, 'q', 1)
        groups[f'{own}/q'] = Group(attention, cuts, heads=model.num_heads[stage], scaled=scaled)
        neck += [*read_by(f'{own}/q', f'{own}/kv'), *made_by(f'{own}/proj')]
        norms.append(f'{path}/norm1')
        if model.reductions[stage] > 1:
          # As wide as the map that it reduces.
          neck += [*read_by(f'{own}/sr'), *made_by(f'{own}/sr')]
          norms.append(f'{own}/norm')
      if hidden:
        own = f'{path}/mlp'
        cuts = (*made_by(f'{own}/fc1'), *made_by(f'{own}/dwconv'), *read_by(f'{own}/fc2'))
        groups[f'{own}/fc1'] = Group(hidden, cuts)
        neck += [*read_by(f'{own}/fc1'), *made_by(f'{own}/fc2')]
        norms.append(f'{path}/norm2')
      there = [own for own, size in zip(_BRANCHES, (attention, hidden), strict=True) if size]
      parts += [path, *(f'{path}/{own}' for own in there)]
    neck += [cut for norm in norms for cut in of_norm(norm)]
    last = stage == len(model.depths) - 1
    neck += read_by('head' if last else f'stages_{stage + 1}/downsample/proj')
    groups[name] = Group(width, tuple(neck), tuple(norms))
    first += depth
  return Structure(groups, tuple(parts), _stages(model))


def _stages(model: PVT) -> tuple[tuple[str, ...], ...]:
  """Returns the paths of each stage's blocks."""
  depths = enumerate(model.depths)
  return tuple(tuple(f'stages_{i}/blocks_{j}' for j in range(depth)) for i, depth in depths)


@shrunk.register
def _(model: PVT, sizes: Mapping[str, int], heads: Mapping[str, int], gone: set[str]) -> PVT:
  stages, blocks = range(len(model.depths)), _stages(model)
  paths = [path for stage in blocks for path in stage]
  num_heads = []
  for stage, own in zip(stages, blocks, strict=True):
    found = {heads[f'{p}/attention/q'] for p in own if f'{p}/attention/q' in heads}
    if len(found) > 1:
      raise ValueError(
        f'stages_{stage}: a PVT has as many heads in all blocks of a stage, not {found}.'
      )
    num_heads.append(found.pop() if found else model.num_heads[stage])
  return model.clone(
    widths=tuple(sizes[f'stages_{stage}'] for stage in stages),
    depths=tuple(sum(path not in gone for path in own) for own in blocks),
    num_heads=tuple(num_heads),
    **_block_fields(paths, 'q', sizes, gone),
  )
