"""Plans: which channels of a network stay, and which of its parts are left out, as data."""

import dataclasses
import json
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from flax import linen as nn

from jaxlab.compression.structure import Group, Structure, shrunk, structure

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Plan:
  """What stays of a network.

  Made by `plan(model, ...)`, which says what can be wrong with it. It holds no arrays: it saves to JSON,
  loads, and composes with a plan for the network that it makes.

  Attributes:
    sizes: channels of each group of the whole network, by which a plan knows whose it is.
    keep: indices that stay, ascending, of the groups that shrink.
    drop: paths of the blocks and branches that are left out.
    heads: by group, the heads of attentions whose channels are grouped anew.
  """

  sizes: Mapping[str, int]
  keep: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  drop: tuple[str, ...] = ()
  heads: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    keep = {name: tuple(map(operator.index, own)) for name, own in self.keep.items()}
    object.__setattr__(self, 'keep', keep)
    object.__setattr__(self, 'drop', tuple(self.drop))
    object.__setattr__(self, 'sizes', dict(self.sizes))
    object.__setattr__(self, 'heads', dict(self.heads))

  @property
  def kept_sizes(self) -> dict[str, int]:
    """Channels of each group that stay."""
    return {name: len(self.keep.get(name, range(size))) for name, size in self.sizes.items()}

  def save(self, path: str | os.PathLike) -> None:
    """Writes the plan as JSON, whole or not at all."""
    from etils import epath

    path = epath.Path(path)
    partial = path.parent / f'{path.name}.partial'
    partial.write_text(json.dumps({'format': _FORMAT, **dataclasses.asdict(self)}, indent=1))
    partial.replace(path)

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Plan':
    """Reads a plan; raises ValueError, with the file's name, for anything else."""
    from etils import epath

    try:
      fields = json.loads(epath.Path(path).read_text())
      if fields.pop('format') != _FORMAT:
        raise ValueError('another format')
      return cls(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise ValueError(f'{os.fspath(path)} holds no plan of this format: {error}.') from None

  def check(self, model: nn.Module) -> Structure:
    """Returns the structure of the network.

    Raises:
      ValueError: if the plan was made for another one, or would break it: a plan that was loaded or made by
        hand is looked at as one that `plan` makes.
    """
    found = structure(model)
    if self.sizes != found.sizes:
      names = [*self.sizes, *(name for name in found.sizes if name not in self.sizes)]
      apart = [name for name in names if self.sizes.get(name) != found.sizes.get(name)]
      shown = ', '.join(
        f'{name}: {self.sizes.get(name)} here, {found.sizes.get(name)} there' for name in apart[:3]
      )
      raise ValueError(f'the plan was made for another network than this one ({shown}).')
    _, problems = _kept(found, self.keep, self.drop, self.heads)
    if problems:
      raise ValueError(f'the plan would break this {type(model).__name__}: {"; ".join(problems)}.')
    return found


def plan(
  model: nn.Module,
  keep: Mapping[str, Sequence[int] | np.ndarray] | None = None,
  drop: Iterable[str] = (),
  heads: Mapping[str, int] | None = None,
) -> Plan:
  """Returns a plan for a network, checked against it.

  Args:
    model: the whole network.
    keep: by group, the indices that stay, or a mask of all of its channels. Groups that are not named stay
      whole.
    drop: paths of blocks and branches that are left out (`structure(model).parts`).
    heads: by group of an attention, its heads afterwards: the channels are then grouped anew, in as many
      equal consecutive parts. By default heads of which nothing stays are gone, the others stay.

  Raises:
    ValueError: for groups and parts that the network does not have, indices out of range or twice, a group of
      which nothing stays, a stage without blocks, heads of different widths; all at once.

  >>> from jaxlab.models import ViT
  >>> made = plan(ViT(depth=2), {'blocks_0/mlp/fc1': range(100)}, drop=['blocks_1/attention'])
  >>> made.kept_sizes['blocks_0/mlp/fc1'], made.drop
  (100, ('blocks_1/attention',))
  """
  found = structure(model)
  heads, drop = dict(heads or {}), tuple(dict.fromkeys(drop))
  kept, problems = _kept(found, dict(keep or {}), drop, heads)
  if problems:
    raise ValueError(f'no plan for this {type(model).__name__}: {"; ".join(problems)}.')
  whole = {name for name, own in kept.items() if len(own) == found.sizes[name]} - set(heads)
  kept = {name: own for name, own in kept.items() if name not in whole}
  made = Plan(found.sizes, kept, drop, {name: heads[name] for name in heads if name in kept})
  # What its fields cannot say, such as heads that differ within a stage, is an error now.
  shrunk(model, made.kept_sizes, head_counts(found, made), set(drop))
  return made


def _kept(
  found: Structure,
  keep: Mapping[str, Sequence[int] | np.ndarray],
  drop: Sequence[str],
  heads: Mapping[str, int],
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
  """Returns the indices that stay, by group, and what is wrong with them and with what is left out."""
  problems = _drop_problems(found, drop)
  problems += [f'heads: {name!r} is not in keep' for name in heads if name not in keep]
  kept = {}
  for name, given in keep.items():
    if name not in found.groups:
      problems.append(f'{name!r} is no group; groups are {_some(found.groups)}')
    elif renamed(name, drop) is not None:
      try:
        kept[name] = _indices(found.groups[name], given, heads.get(name))
      except ValueError as error:
        problems.append(f'{name}: {error}')
  return kept, problems


def _indices(group: Group, given: Sequence[int] | np.ndarray, heads: int | None) -> tuple[int, ...]:
  """Returns the indices that stay, ascending; raises ValueError for none, wrong ones, or torn heads."""
  indices = np.asarray(given)
  if indices.dtype == bool and indices.shape == (group.size,):
    indices = np.flatnonzero(indices)
  elif indices.ndim == 1 and not indices.size:
    indices = indices.astype(int)
  if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
    raise ValueError(f'expected indices, or a mask of {group.size} channels; got {given!r:.60}')
  if not indices.size:
    raise ValueError('nothing would stay')
  if indices.min() < 0 or indices.max() >= group.size:
    raise ValueError(f'indices from {indices.min()} to {indices.max()} of {group.size} channels')
  if len(np.unique(indices)) != indices.size:
    raise ValueError('indices come twice')
  if heads is not None and (heads < 1 or group.size % heads):
    raise ValueError(f'{group.size} channels do not divide into {heads} heads')
  if len(set(counts := _head_widths(group, indices, heads))) > 1:
    raise ValueError(f'heads would have different widths, {counts}')
  return tuple(sorted(indices.tolist()))


def _head_widths(group: Group, indices: Iterable[int], heads: int | None) -> list[int]:
  """Returns the channels that stay of each head; without new ones, of heads of which any stay."""
  count = heads or group.heads
  widths = np.bincount(np.asarray(list(indices)) // (group.size // count), minlength=count).tolist()
  return widths if heads else [width for width in widths if width]


def head_counts(found: Structure, made: Plan) -> dict[str, int]:
  """Returns the heads of each attention once a plan is carried out, by group."""
  attentions = {name: group for name, group in found.groups.items() if group.scaled}
  return {
    name: len(_head_widths(group, made.keep[name], made.heads.get(name)))
    if name in made.keep
    else group.heads
    for name, group in attentions.items()
    if renamed(name, made.drop) is not None
  }


def _drop_problems(found: Structure, drop: Sequence[str]) -> list[str]:
  """Returns what is wrong with the parts that are to be left out."""
  problems = [
    f'{path!r} cannot be left out; parts that can are {_some(found.parts)}'
    for path in drop
    if path not in found.parts
  ]
  problems += [
    f'no block would be left of the stage of {stage[0]}'
    for stage in found.stages
    if set(stage) <= set(drop)
  ]
  return problems


def renamed(path: str, drop: Iterable[str]) -> str | None:
  """Returns what a path is called once blocks are left out; None: it is gone.

  Blocks behind one that is left out move up: without `layer1_1`, `layer1_2` is `layer1_1`.

  >>> renamed('layer1_2/conv1', ['layer1_1']), renamed('layer1_1/conv1', ['layer1_1'])
  ('layer1_1/conv1', None)
  """
  drop = list(drop)
  if any(path == part or path.startswith(f'{part}/') for part in drop):
    return None
  blocks = [match.groups() for part in drop if (match := re.fullmatch(r'(.*_)(\d+)', part))]
  for stem in dict.fromkeys(stem for stem, _ in blocks):
    if match := re.match(rf'{re.escape(stem)}(\d+)(?=/|$)', path):
      before = sum(own == stem and int(number) < int(match[1]) for own, number in blocks)
      return f'{stem}{int(match[1]) - before}{path[match.end() :]}'
  return path


def compose(model: nn.Module, first: Plan, second: Plan) -> Plan:
  """Returns the one plan that does what two do one after the other.

  Args:
    model: the whole network.
    first: for it.
    second: for the network that `first` makes (`slice_network`).

  Raises:
    ValueError: if either plan was made for another network; or if one of the two groups the channels of an
      attention anew and the other leaves unequal parts of the new heads.
  """
  whole = first.check(model)
  names = {renamed(name, first.drop): name for name in whole.groups}
  parts = {renamed(part, first.drop): part for part in whole.parts}
  left = {name: first.kept_sizes[old] for name, old in names.items() if name is not None}
  if left != second.sizes:
    raise ValueError(
      'compose: the second plan was not made for the network that the first one makes.'
    )
  keep = dict(first.keep)
  for name, own in second.keep.items():
    old = names[name]
    before = first.keep.get(old, range(whole.groups[old].size))
    keep[old] = tuple(before[i] for i in own)
  drop = (*first.drop, *(parts[part] for part in second.drop))
  heads = {**first.heads, **{names[name]: own for name, own in second.heads.items()}}
  return plan(model, keep, drop, {name: own for name, own in heads.items() if name in keep})


def _some(names: Iterable[str]) -> str:
  names = list(names)
  return ', '.join(names[:6]) + (f' and {len(names) - 6} more' if len(names) > 6 else '')
