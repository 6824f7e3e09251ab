"""Linear adaptors around a dropped block: 1x1 convolutions that start as the identity.

When a residual block is dropped, those before and behind it can make up for it. How well they can is seen
from 1x1 convolutions without bias, some before, some behind convolutions, which alone are trained
(PRACTISE). Being linear they are one with the kernel that they stand next to, so that training them is
training a function of the parameters, `fold_adaptors`; `adaptor_hooks` run them as modules of their own.

Adaptors mirror the modules, `{'layer1_0': {'conv2': {'after': [out, out]}}, ...}`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from jaxlab.models import Anatomy, Hook, Site
from jaxlab.models import anatomy as anatomy_of
from jaxlab.models.anatomy_parts import Block

Array = jax.Array
PyTree = Any

BEFORE, AFTER = 'before', 'after'


class AdaptorPositions(NamedTuple):
  """Convolutions with an adaptor, by their paths in the whole network.

  Attributes:
    before: those whose input is adapted, in front of their padding.
    after: those whose output is adapted, in front of their norm.
  """

  before: tuple[str, ...]
  after: tuple[str, ...]


def stage_of(path: str) -> str:
  """Returns the stage of a block: its path without the number at its end.

  >>> stage_of('layer1_0'), stage_of('stages_2/blocks_1')
  ('layer1', 'stages_2/blocks')
  """
  return path.rpartition('_')[0]


def candidate_blocks(model: nn.Module, anatomy: Anatomy | None = None) -> tuple[str, ...]:
  """Returns the blocks that may be dropped: with an identity as shortcut, and not the first of their stage.

  Args:
    model: a network of convolutional residual blocks.
    anatomy: of an own network.

  Raises:
    ValueError: for a network with other blocks, or without such a block.

  >>> from jaxlab import models
  >>> candidate_blocks(models.create('resnet18'))
  ('layer1_1', 'layer2_1', 'layer3_1', 'layer4_1')
  """
  blocks = _blocks(model, anatomy)
  found = tuple(
    block.path
    for before, block in itertools.pairwise(blocks)
    if block.shortcut == 'identity' and stage_of(block.path) == stage_of(before.path)
  )
  if not found:
    raise ValueError(f'{type(model).__name__}: no block can be dropped; all change the shape.')
  return found


def adaptor_positions(
  model: nn.Module,
  dropped: Collection[str],
  *,
  last_conv: Literal['trunk', 'code'] = 'trunk',
  anatomy: Anatomy | None = None,
) -> AdaptorPositions:
  """Returns where adaptors stand when blocks are dropped.

  Behind the last convolution of each block before the gap in the same stage, and behind the projection on its
  first block's shortcut; before the first convolution of each block after the gap in the same stage, and
  before that of the next stage's first block, and its shortcut's. Behind the gaps of the last stage only
  blocks of that stage are adapted: no stage follows. Paths are those of the whole network.

  Args:
    model: the whole network.
    dropped: paths of blocks, of `candidate_blocks`.
    last_conv: of bottlenecks 'trunk', the convolution that writes to the trunk, as in the paper's figure; or
      'code', the 3x3 one, as in its code, which looks for `conv2`.
    anatomy: of an own network.

  Raises:
    ValueError: for blocks that cannot be dropped, an unknown `last_conv`, or 'code' with grouped
      convolutions.

  References:
    Wang & Wu, Practical Network Acceleration with Tiny Sets, CVPR 2023 (https://arxiv.org/abs/2202.07861).

  >>> from jaxlab import models
  >>> adaptor_positions(models.create('resnet34'), ['layer4_2'])
  AdaptorPositions(before=(), after=('layer4_0/downsample_0', 'layer4_0/conv2', 'layer4_1/conv2'))
  """
  if last_conv not in ('trunk', 'code'):
    raise ValueError(f"last_conv={last_conv!r}: expected 'trunk' or 'code'.")
  require_candidates(model, dropped, anatomy)
  if last_conv == 'code' and getattr(model, 'cardinality', 1) > 1:
    raise ValueError(
      "last_conv='code': no adaptor is one with a convolution in groups; take 'trunk'."
    )
  blocks = _blocks(model, anatomy)
  stages = list(dict.fromkeys(stage_of(block.path) for block in blocks))
  before: dict[str, None] = {}
  after: dict[str, None] = {}
  for gap, block in enumerate(blocks):
    if block.path not in dropped:
      continue
    stage = stage_of(block.path)
    following = stages[stages.index(stage) + 1 :][:1]
    for index, other in enumerate(blocks):
      own = stage_of(other.path)
      if other.path in dropped or own not in (stage, *following):
        continue
      if own == stage and index < gap:
        after |= dict.fromkeys((*other.shortcut_layers, _last_conv(other, last_conv)))
      elif own == stage or stage_of(blocks[index - 1].path) == stage:
        before |= dict.fromkeys((other.branches[0].layers[0], *other.shortcut_layers))
  return AdaptorPositions(tuple(before), tuple(after))


def require_candidates(
  model: nn.Module, dropped: Collection[str], anatomy: Anatomy | None = None
) -> None:
  """Raises ValueError unless all of `dropped`, at least one, are `candidate_blocks`."""
  known = candidate_blocks(model, anatomy)
  if isinstance(dropped, str) or not dropped or (wrong := sorted(set(dropped) - set(known))):
    found = repr(dropped) if isinstance(dropped, str) or not dropped else ', '.join(wrong)
    raise ValueError(
      f'dropped: {found}: expected some of {", ".join(known)}; others change the shape or begin a stage.'
    )


def init_adaptors(params: Mapping[str, PyTree], positions: AdaptorPositions) -> PyTree:
  """Returns adaptors that change nothing, identities `[channels, channels]` in the type of the kernels.

  Args:
    params: of the whole network.
    positions: see `adaptor_positions`.

  Raises:
    ValueError: for a convolution that is not there, or whose channels are in groups (there no adaptor is one
      with the kernel).
  """
  flat = {}
  for name, paths in ((BEFORE, positions.before), (AFTER, positions.after)):
    for path in paths:
      kernel = _layer(params, path)['kernel']
      channels = kernel.shape[-2 if name == BEFORE else -1]
      if name == BEFORE and channels == 1:
        raise ValueError(f'{path}: no adaptor stands before a depthwise convolution.')
      flat[*path.split('/'), name] = jnp.eye(channels, dtype=kernel.dtype)
  return traverse_util.unflatten_dict(flat)


def adaptor_hooks(adaptors: PyTree, collection: str = 'adaptors') -> list[Hook]:
  """Returns the hooks that run adaptors, as layers of their own, out of the variables' `collection`.

  Channel d of what they return is `sum_c A[d, c] x[..., c]`.

  >>> hooks = adaptor_hooks({'layer1_0': {'conv2': {'after': jnp.eye(4)}}})
  >>> [hook.pattern for hook in hooks]
  ['layer1_0/conv2']
  """

  def adapt(name: str) -> Any:
    return lambda site, x: _adapted(x, site, name)

  found = []
  for path in traverse_util.flatten_dict(adaptors):
    side = {BEFORE: 'input', AFTER: 'output'}[path[-1]]
    found.append(Hook('/'.join(path[:-1]), **{side: adapt(path[-1])}, collection=collection))
  return found


def _adapted(x: Array, site: Site, name: str) -> Array:
  return jnp.einsum('...c,dc->...d', x, site.read(name), precision='highest')


def fold_adaptors(params: Mapping[str, PyTree], adaptors: PyTree) -> dict[str, PyTree]:
  """Returns the parameters in which adaptors are one with their convolutions.

    after, A:  W'[..., i, o] = sum_p A[o, p] W[..., i, p],  b' = A b
    before, P: W'[..., i, o] = sum_p W[..., p, o] P[p, i]

  Exact, at the border, too: adaptors have no bias, and zeros stay zeros. Differentiable in both.

  Args:
    params: of the network that the adaptors' paths are of.
    adaptors: see `init_adaptors`.

  Raises:
    ValueError: for an adaptor that does not fit its convolution.

  References:
    Wang & Wu, Practical Network Acceleration with Tiny Sets, CVPR 2023 (https://arxiv.org/abs/2202.07861).

  >>> params = {'conv': {'kernel': jnp.array([[2.0, 3.0]]), 'bias': jnp.ones(2)}}
  >>> folded = fold_adaptors(params, {'conv': {'after': jnp.array([[0.0, 1.0], [1.0, 0.0]])}})
  >>> folded['conv']['kernel'].tolist()
  [[3.0, 2.0]]
  """
  flat = traverse_util.flatten_dict(dict(params))
  for path, own in traverse_util.flatten_dict(adaptors).items():
    *where, name = path
    layer = _layer(params, '/'.join(where))
    key = (*where, 'kernel')
    channels = flat[key].shape[-2 if name == BEFORE else -1]
    if own.shape != (channels, channels):
      raise ValueError(
        f'{"/".join(path)}: an adaptor {own.shape} does not fit the kernel {flat[key].shape}.'
      )
    if name == BEFORE:
      flat[key] = jnp.einsum('...po,pi->...io', flat[key], own, precision='highest')
    else:
      flat[key] = jnp.einsum('...ip,op->...io', flat[key], own, precision='highest')
      if 'bias' in layer:
        flat[*where, 'bias'] = jnp.einsum('p,op->o', layer['bias'], own, precision='highest')
  return traverse_util.unflatten_dict(flat)


def _blocks(model: nn.Module, anatomy: Anatomy | None) -> tuple[Block, ...]:
  blocks = (anatomy or anatomy_of(model)).blocks
  if not blocks or any([own.kind for own in block.branches] != ['conv'] for block in blocks):
    raise ValueError(
      f'{type(model).__name__}: expected a network whose blocks each have one branch of convolutions.'
    )
  return blocks


def _last_conv(block: Block, last_conv: str) -> str:
  layers = block.branches[0].layers
  named = [path for path in layers if last_conv == 'code' and path.endswith('/conv2')]
  return named[0] if named else layers[-1]


def _layer(params: Mapping[str, PyTree], path: str) -> Mapping[str, Array]:
  found: Any = params
  for name in path.split('/'):
    found = found.get(name, {}) if isinstance(found, Mapping) else {}
  if 'kernel' not in found:
    raise ValueError(f'{path!r}: there is no such convolution among the parameters.')
  return found
