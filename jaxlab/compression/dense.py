"""Any number of operations by compressed transformer blocks: without attention, with a part of the MLP.

Dropping whole blocks gives as many sizes as there are blocks. A block `y = x + MLP'(norm2(x))`, of whose
hidden neurons a part is kept, gives all between them. Host code in float64: where a target is met by whole
blocks, float32 would round up to one block more.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlab.compression.selection import highest_channels

Counter = Literal['exact', 'official']
MODES = ('random', 'gelu', 'norm')


class BlockMacs(NamedTuple):
  """Multiply-accumulates of a transformer block's two modules.

  Attributes:
    attention: of the first.
    mlp: of the second.
  """

  attention: float
  mlp: float


class DenseStructure(NamedTuple):
  """What meets a number of operations.

  Attributes:
    num_blocks: blocks that are compressed.
    drop_ratio: share of the hidden neurons that is dropped in each of them; 1: the block is an identity.
  """

  num_blocks: int
  drop_ratio: float


def block_macs(tokens: int, width: int, hidden: int, counter: Counter = 'exact') -> BlockMacs:
  """Returns what the attention and the MLP of a plain block cost for an image.

    attention = 4 N D^2 + 2 N^2 D   ('exact'),   4 N D^2 + 4 N D   ('official');   mlp = 2 N D F

  Norms and softmax are not counted by 'exact'; 'official' counts the attention's norm at 4 an element, and
  the two products of attention not at all.

  Args:
    tokens: N.
    width: D, of a token.
    hidden: F, neurons of the MLP.
    counter: 'exact', or as DC-ViT's code counts.

  Raises:
    ValueError: for sizes below 1, or another counter.

  References:
    Zhang et al., Dense Vision Transformer Compression with Few Samples, CVPR 2024
    (https://arxiv.org/abs/2403.18708), the official code.

  >>> block_macs(65, 48, 192)
  BlockMacs(attention=1004640.0, mlp=1198080.0)
  """
  for name, value in (('tokens', tokens), ('width', width), ('hidden', hidden)):
    if value < 1:
      raise ValueError(f'{name}={value}: expected at least 1.')
  further = {'exact': 2 * tokens**2 * width, 'official': 4 * tokens * width}
  if counter not in further:
    raise ValueError(f"counter={counter!r}: expected 'exact' or 'official'.")
  attention = 4 * tokens * width**2 + further[counter]
  return BlockMacs(float(attention), float(2 * tokens * width * hidden))


def vit_macs(
  tokens: int,
  width: int,
  hidden: int,
  depth: int,
  *,
  patch_size: int,
  num_classes: int,
  channels: int = 3,
  counter: Counter = 'exact',
) -> float:
  """Returns what a plain vision transformer costs for an image: blocks, patch embedding, classifier.

    depth (attention + mlp) + (N - 1) D channels patch^2 + D classes

  'official' counts the other norms, too: 4 N D more in every block and once at the end.

  Args:
    tokens: N, the class token included.
    width: D.
    hidden: F.
    depth: blocks.
    patch_size: in pixels.
    num_classes: of the classifier.
    channels: of an image.
    counter: see `block_macs`.

  Raises:
    ValueError: as `block_macs`.
  """
  norm = 4 * tokens * width if counter == 'official' else 0
  block = sum(block_macs(tokens, width, hidden, counter)) + norm
  ends = (tokens - 1) * width * channels * patch_size**2 + width * num_classes
  return float(depth * block + ends + norm)


def dense_structure(
  removed: float, macs: BlockMacs, depth: int, num_blocks: int | None = None
) -> DenseStructure:
  """Returns how many blocks are compressed, and how much of their MLPs is dropped, to remove some operations.

    k = ceil(removed / (attention + mlp));   drop_ratio = (removed / k - attention) / mlp

  At exactly j blocks that is dropping them; with `num_blocks` one more, the same is removed from j + 1.
  Where one block is compressed and less is to be removed than its attention costs, the whole MLP stays and
  more is removed than was asked for: a warning says so.

  Args:
    removed: multiply-accumulates.
    macs: of a block.
    depth: blocks of the network.
    num_blocks: k; None: the smallest.

  Raises:
    ValueError: unless something is removed, and at most all blocks; for a number of blocks that is too small
      or too large, or whose attentions alone are more than what is to be removed.

  References:
    Zhang et al., Dense Vision Transformer Compression with Few Samples, CVPR 2024
    (https://arxiv.org/abs/2403.18708), the official code, which refuses what is clipped here.

  >>> dense_structure(21.0, BlockMacs(4.0, 6.0), 12)
  DenseStructure(num_blocks=3, drop_ratio=0.5)
  """
  whole = macs.attention + macs.mlp
  if not 0 < removed <= depth * whole * (1 + 1e-9):
    raise ValueError(
      f'removed={removed:g}: expected more than 0 and at most {depth * whole:g}, all {depth} blocks.'
    )
  fewest = max(1, math.ceil(removed / whole - 1e-12))
  count = fewest if num_blocks is None else num_blocks
  if not fewest <= count <= depth:
    raise ValueError(
      f'num_blocks={count}: expected {fewest} to {depth}; fewer blocks do not hold removed={removed:g}.'
    )
  ratio = (removed / count - macs.attention) / macs.mlp
  if ratio < -1e-12:
    if count > 1:
      raise ValueError(
        f'num_blocks={count}: without their attentions, {count * macs.attention:g}, more is removed than '
        f'removed={removed:g}; take fewer blocks.'
      )
    warnings.warn(
      f'removed={removed:g} is less than one attention, {macs.attention:g}: that much is removed, and the '
      'target is overshot.',
      stacklevel=2,
    )
  assert ratio <= 1 + 1e-9, (removed, macs, count)
  # Whole blocks that come out a rounding error short are whole blocks.
  return DenseStructure(count, 1.0 if ratio > 1 - 1e-9 else float(max(ratio, 0.0)))


def kept_hidden(drop_ratio: float, hidden: int, multiple: int = 1) -> int:
  """Returns how many hidden neurons stay: `int((1 - drop_ratio) hidden + 1e-6)`, but one if any share stays.

  Args:
    drop_ratio: in [0, 1]; with 1 none stays.
    hidden: neurons that are there.
    multiple: the number is rounded to the nearest multiple of this (inferred), at least one of them and at
      most those that are there.

  Raises:
    ValueError: for a share out of range, or sizes below 1.

  >>> kept_hidden(0.5002, 3072), kept_hidden(0.5002, 3072, 8), kept_hidden(1.0, 3072)
  (1535, 1536, 0)
  """
  if not 0 <= drop_ratio <= 1:
    raise ValueError(f'drop_ratio={drop_ratio}: expected a share in [0, 1].')
  if hidden < 1 or not 1 <= multiple <= hidden:
    raise ValueError(f'hidden={hidden}, multiple={multiple}: expected 1 <= multiple <= hidden.')
  if drop_ratio > 1 - 1e-9:
    return 0
  kept = int((1 - drop_ratio) * hidden + 1e-6)
  if multiple > 1:
    kept = min(multiple * max(1, round(kept / multiple)), hidden // multiple * multiple)
  return max(kept, 1)


def kept_neurons(
  key: jax.Array,
  fc1: ArrayLike,
  fc2: ArrayLike,
  count: int,
  mode: Literal['random', 'gelu', 'norm'] = 'random',
  activations: ArrayLike | None = None,
) -> np.ndarray:
  """Returns which hidden neurons of an MLP stay.

  Args:
    key: of a random choice.
    fc1: kernel `[width, hidden]` of the first layer.
    fc2: kernel `[hidden, width]` of the second.
    count: neurons that stay.
    mode: 'random': uniformly; 'gelu': those of the largest mean activation; 'norm': of the largest
      `|fc1[:, i]| |fc2[i]|` (inferred).
    activations: `[..., hidden]`, of 'gelu': behind the activation function, of some images.

  Returns:
    int64 `[count]`, ascending.

  Raises:
    ValueError: for kernels that do not fit, a count out of range, another mode or activations that are
      missing.

  References:
    Zhang et al., Dense Vision Transformer Compression with Few Samples, CVPR 2024
    (https://arxiv.org/abs/2403.18708), the official code: 'random' is its default.

  >>> fc1 = jnp.array([[1.0, 3.0, 2.0]])
  >>> kept_neurons(jax.random.key(0), fc1, fc1.T, 2, 'norm').tolist()
  [1, 2]
  """
  fc1, fc2 = jnp.asarray(fc1), jnp.asarray(fc2)
  hidden = fc1.shape[-1]
  if fc1.ndim != 2 or fc2.ndim != 2 or fc2.shape[0] != hidden:
    raise ValueError(
      f'fc1 {fc1.shape}, fc2 {fc2.shape}: expected [width, hidden], [hidden, width].'
    )
  if not 1 <= count <= hidden:
    raise ValueError(f'count={count}: expected 1 to {hidden}, the neurons that are there.')
  if mode == 'random':
    return np.sort(np.asarray(jax.random.permutation(key, hidden)[:count], np.int64))
  if mode == 'norm':
    scores = jnp.linalg.norm(fc1, axis=0) * jnp.linalg.norm(fc2, axis=1)
  elif mode != 'gelu':
    raise ValueError(f'mode={mode!r}: expected one of {", ".join(MODES)}.')
  elif activations is None or jnp.shape(activations)[-1:] != (hidden,):
    raise ValueError(
      f"activations: mode='gelu' needs those of all neurons, [..., {hidden}], got "
      f'{None if activations is None else jnp.shape(activations)}.'
    )
  else:
    values = jnp.asarray(activations)
    scores = jnp.mean(values.astype(jnp.float32), range(values.ndim - 1))
  return highest_channels(np.asarray(scores), count)
