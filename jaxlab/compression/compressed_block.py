"""Transformer blocks without attention and with a part of their MLPs: `y = x + MLP'(norm2(x))`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax import linen as nn

from jaxlab.compression.dense import (
  Counter,
  block_macs,
  dense_structure,
  kept_hidden,
  vit_macs,
)
from jaxlab.compression.plan import plan
from jaxlab.compression.slicing import slice_network
from jaxlab.models.vit import ViT

PyTree = Any


class DenseCut(NamedTuple):
  """What a reduction asks of a vision transformer.

  Attributes:
    num_blocks: blocks that are compressed.
    kept: hidden neurons that stay in each of them; 0: they are identities.
    off_target: difference between what is removed so and what was asked for, a share of what is counted.
  """

  num_blocks: int
  kept: int
  off_target: float


def dense_cut(
  model: nn.Module,
  reduction: float,
  *,
  num_blocks: int | None = None,
  multiple: int = 1,
  counter: Counter = 'exact',
  channels: int = 3,
) -> DenseCut:
  """Returns how many inner blocks of a ViT are compressed, and how much of them stays, see `dense_structure`.

  Args:
    model: a plain `ViT`: one class token, MLPs with a plain activation.
    reduction: share of the multiply-accumulates that is removed: with the counter 'exact' of all blocks',
      with 'official' of the whole network's.
    num_blocks: blocks; None: the fewest.
    multiple: of which the number of neurons is one.
    counter: see `block_macs`.
    channels: of images.

  Raises:
    ValueError: for another network, a share out of range, or if more blocks are compressed than there are
      between the first and the last.

  >>> dense_cut(ViT(), 0.25)
  DenseCut(num_blocks=3, kept=0, off_target=0.0)
  >>> dense_cut(ViT(), 0.25, num_blocks=4)[:2]
  (4, 337)
  """
  if not isinstance(model, ViT) or model.distilled or model.activation == 'swiglu':
    raise ValueError(f'model: expected a plain ViT, got {type(model).__name__}.')
  if model.attention_widths or model.hidden_widths:
    raise ValueError('model: expected a ViT of equal blocks, not one that was cut before.')
  hidden = int(model.width * model.mlp_ratio)
  tokens = model.num_prefix_tokens + math.prod(model.grid)
  size = {'tokens': tokens, 'width': model.width, 'hidden': hidden, 'counter': counter}
  macs, total = block_macs(**size), model.depth * sum(block_macs(**size))
  if counter == 'official':
    own = {'patch_size': model.patch_size, 'num_classes': model.num_classes or 0}
    total = vit_macs(**size, **own, depth=model.depth, channels=channels)
  wanted = reduction * total
  count, ratio = dense_structure(wanted, macs, model.depth, num_blocks)
  if count > model.depth - 2:
    raise ValueError(
      f'{count} blocks are compressed; of depth={model.depth} all can be but the first and the last.'
    )
  kept = kept_hidden(ratio, hidden, multiple)
  reached = count * (macs.attention + (1 - kept / hidden) * macs.mlp)
  return DenseCut(count, kept, abs(reached - wanted) / total)


def compress_block(
  model: nn.Module, variables: Mapping[str, PyTree], block: int, kept: Sequence[int]
) -> tuple[nn.Module, dict[str, PyTree]]:
  """Returns a transformer with one more block compressed, and its variables.

  Its attention and the norm in front of it go; of its MLP the hidden neurons `kept` stay, with biases, norm
  and activation. Without any the block is an identity; blocks keep their numbers.

  Args:
    model: a `ViT`.
    variables: its collections.
    block: index of a block that has its attention.
    kept: indices of hidden neurons.

  Raises:
    ValueError: for another network, a block that is not there or was compressed before, or wrong indices.

  References:
    Zhang et al., Dense Vision Transformer Compression with Few Samples, CVPR 2024
    (https://arxiv.org/abs/2403.18708), the official code.
  """
  if not isinstance(model, ViT):
    raise ValueError(f'model: expected a ViT, got {type(model).__name__}.')
  path = f'blocks_{block}'
  keep = {f'{path}/mlp/fc1': kept} if len(kept) else {}
  drop = [f'{path}/attention'] if len(kept) else [f'{path}/attention', f'{path}/mlp']
  return slice_network(model, variables, plan(model, keep, drop))


def frozen_behind(depth: int, blocks: Sequence[int]) -> tuple[str, ...]:
  """Returns patterns of the parameters that are not tuned once some blocks are compressed.

  Trained is all from the input up to the block behind the last compressed one, and the last norm; frozen are
  the blocks after that, and the head.

  Args:
    depth: blocks of the network.
    blocks: the compressed ones.

  Raises:
    ValueError: without blocks, or for some that are not there.

  References:
    Zhang et al., Dense Vision Transformer Compression with Few Samples, CVPR 2024
    (https://arxiv.org/abs/2403.18708), the official code.

  >>> frozen_behind(6, [1, 3]), frozen_behind(6, [5])
  (('blocks_5/.*', 'head/.*'), ('head/.*',))
  """
  if not len(blocks) or not 0 <= min(blocks) <= max(blocks) < depth:
    raise ValueError(f'blocks={list(blocks)}: expected some of 0 to {depth - 1}.')
  return (*(rf'blocks_{index}/.*' for index in range(max(blocks) + 2, depth)), 'head/.*')
