"""The plan that gives a network the shape of a smaller one of its kind."""

import re
from collections.abc import Mapping

import numpy as np
from flax import linen as nn

from jaxlab.compression.plan import Plan, plan, renamed
from jaxlab.compression.selection import highest_channels, highest_channels_by_head
from jaxlab.compression.structure import Structure, structure


def shape_names(full: nn.Module, small: nn.Module) -> list[str]:
  """Returns what must have scores to cut `full` to the shape of `small`: groups, and blocks of some stages.

  Blocks are those of stages that have fewer of them in `small`.
  """
  own, wanted = structure(full), _blocks(structure(small))
  fewer = [
    block
    for stage, blocks in _blocks(own).items()
    if len(blocks) > len(wanted.get(stage, ()))
    for block in blocks
  ]
  return [*own.groups, *fewer]


def shape_plan(full: nn.Module, small: nn.Module, scores: Mapping[str, np.ndarray]) -> Plan:
  """Returns the plan that leaves of each group, and of each stage's blocks, those of the highest scores.

  The result of `slice_network` then has the variables of an ordinary `small` network. Channels of attentions
  are grouped anew (`highest_channels_by_head`), with the heads of `small`.

  Args:
    full: the network.
    small: of the same kind, nowhere larger.
    scores: by group `[channels]`, by block a number; of `shape_names`.

  Raises:
    ValueError: if `small` lacks a group or has a larger one, its heads do not divide the channels, or it
      leaves a single channel to a layer norm, which would make it 0.

  References:
    Yu & Wu, A Unified Pruning Framework for Vision Transformers, 2023 (https://arxiv.org/abs/2111.15127).
    That blocks are left out by their own scores is inferred.

  >>> from jaxlab.models import ViT
  >>> full, small = ViT(width=8, num_heads=4, depth=1), ViT(width=4, num_heads=2, depth=1)
  >>> sizes = {'neck': 8, 'blocks_0/attention/qkv': 8, 'blocks_0/mlp/fc1': 32}
  >>> made = shape_plan(full, small, {name: np.arange(size) for name, size in sizes.items()})
  >>> made.keep['neck'], made.keep['blocks_0/attention/qkv']
  ((4, 5, 6, 7), (2, 3, 6, 7))
  """
  own, wanted, drop = structure(full), structure(small), []
  for stage, blocks in _blocks(own).items():
    count = len(_blocks(wanted).get(stage, ()))
    if not count:
      raise ValueError(f'the smaller network has no {stage}0, as the network has.')
    if count < len(blocks):
      stays = highest_channels(np.array([scores[block] for block in blocks]), count)
      drop += [block for index, block in enumerate(blocks) if index not in stays]
  keep, heads = {}, {}
  for name, group in own.groups.items():
    new = renamed(name, drop)
    if new is None:
      continue
    if new not in wanted.groups:
      raise ValueError(f'the smaller network has no {new!r}, as the network has ({name}).')
    size = wanted.groups[new].size
    if size < 2 and group.norms:
      raise ValueError(f'{name}: of one channel a layer norm leaves nothing; keep at least 2.')
    try:
      if group.scaled:  # an attention
        heads[name] = wanted.groups[new].heads
        keep[name] = highest_channels_by_head(scores[name], size, heads[name])
      else:
        keep[name] = highest_channels(scores[name], size)
    except ValueError as error:
      raise ValueError(f'{name}, which becomes {new}: {error}') from None
  if more := [name for name in wanted.groups if name not in {renamed(own, drop) for own in keep}]:
    raise ValueError(f'the network has no {more[0]!r}, as the smaller one has.')
  return plan(full, keep, drop, heads)


def _blocks(found: Structure) -> dict[str, list[str]]:
  """Returns the blocks of each stage, by their paths up to the number."""
  stages: dict[str, list[str]] = {}
  for part in found.parts:
    if match := re.fullmatch(r'(.*_)\d+', part):
      stages.setdefault(match[1], []).append(part)
  return stages
