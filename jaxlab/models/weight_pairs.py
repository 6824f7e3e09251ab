"""Pairs of consecutive weight matrices within the blocks of a transformer, as functions of its parameters."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.anatomy import anatomy as anatomy_of
from jaxlab.models.anatomy_parts import Anatomy, Block
from jaxlab.models.bloom import Bloom
from jaxlab.models.classifier_heads import Classifier
from jaxlab.models.gpt2 import GPT2
from jaxlab.models.siamese import Encoder
from jaxlab.models.swin import Swin
from jaxlab.models.vit import ViT

Array = jax.Array
PyTree = Any
Kind = Literal['mlp', 'vo', 'qk']


@dataclasses.dataclass(frozen=True)
class Factor:
  """One matrix `[in, out]`, or one a head, within a kernel.

  Attributes:
    path: of the kernel in the parameters.
    part: (index, count): which of as many equal parts of the outputs; a fused projection holds 3.
    heads: the number of heads that its hidden axis is cut into, which go in front; None: one matrix.
    hidden: whether its outputs (`'out'`) or its inputs (`'in'`) are the hidden axis.
    transposed: swap the two axes at the end.
    norm: path of the scale of the normalization before it, which multiplies its inputs as a constant; None:
      the kernel alone.
  """

  path: str
  part: tuple[int, int] = (0, 1)
  heads: int | None = None
  hidden: Literal['in', 'out'] = 'out'
  transposed: bool = False
  norm: str | None = None

  def __call__(self, params: PyTree) -> Array:
    """Returns the matrix `[..., in, out]` of `params`, with heads in front; raises ValueError without it."""
    kernel, (index, count) = _leaf(params, self.path), self.part
    if kernel.ndim < 2 or kernel.shape[-1] % count:
      raise ValueError(f'{self.path} {kernel.shape} has no {count} parts [in, out].')
    size = kernel.shape[-1] // count
    kernel = kernel[..., index * size : (index + 1) * size]
    if self.norm is not None:
      kernel = kernel * jax.lax.stop_gradient(_leaf(params, self.norm))[..., None]
    if self.heads is not None:
      *lead, rows, columns = kernel.shape
      cut = rows if self.hidden == 'in' else columns
      if cut % self.heads:
        raise ValueError(
          f'{self.path}: {self.heads} heads do not divide the {cut} channels of {kernel.shape}.'
        )
      if self.hidden == 'in':
        kernel = kernel.reshape(*lead, self.heads, rows // self.heads, columns)
      else:
        kernel = kernel.reshape(*lead, rows, self.heads, columns // self.heads)
        kernel = jnp.moveaxis(kernel, -2, -3)
    return jnp.swapaxes(kernel, -1, -2) if self.transposed else kernel


@dataclasses.dataclass(frozen=True)
class WeightPair:
  """Two matrices of which the second is applied to what the first returns; a function of the parameters.

  Attributes:
    name: what it is called in tables, e.g. `blocks_3/mlp`.
    first: `[..., in, hidden]`.
    second: `[..., hidden, out]`.
  """

  name: str
  first: Factor
  second: Factor

  def __call__(self, params: PyTree) -> tuple[Array, Array]:
    """Returns both matrices.

    Raises:
      ValueError: if a kernel is missing (the message lists some that are there), or the two do not chain.
    """
    first, second = self.first(params), self.second(params)
    if first.shape[-1] != second.shape[-2] or first.shape[:-2] != second.shape[:-2]:
      raise ValueError(
        f'{self.first.path} and {self.second.path} do not chain: as a pair they are {first.shape} and '
        f'{second.shape}.'
      )
    return first, second


def weight_pairs(
  model: nn.Module,
  which: Sequence[Kind] = ('mlp', 'vo'),
  *,
  per_head: bool = True,
  fold_norm: bool = False,
  anatomy: Anatomy | None = None,
  num_heads: int | Sequence[int] | None = None,
) -> tuple[WeightPair, ...]:
  """Returns the pairs of consecutive matrices of all blocks.

  - `'mlp'`: the two layers of the MLP; the activation between them is ignored.
  - `'vo'`: of each head the projection to values, and its rows of the output projection: attention mixes
    tokens, not channels.
  - `'qk'`: of each head the projection to keys, and that to queries transposed, whose product makes the
    logits.

  Biases are not in it. Reads a fused projection `[width, 3 width]` (query, key, value) by its parts, and
  kernels that `nn.scan` stacks with the blocks in front.

  Args:
    model: a ViT, Swin or GPT-2 of this library (also within a `Classifier` or `Encoder`), or any with an
      `anatomy` whose attention is a fused projection and an output projection, and whose MLP two layers.
    which: of the above.
    per_head: one pair a head; otherwise `'vo'` and `'qk'` are of all heads at once.
    fold_norm: multiply the first matrix by the scale of the normalization before it, a constant.
    anatomy: of the model; None: `models.anatomy(model)`.
    num_heads: of each block, or of all; None: those of the model. Needed per head for other models.

  Raises:
    ValueError: for an unknown or no kind, blocks without such branches, heads or norms that are not known,
      and attention whose fused projection has other parts: BLOOM's, and GPT-2's with grouped queries.

  >>> pairs = weight_pairs(ViT(depth=2))
  >>> [pair.name for pair in pairs]
  ['blocks_0/mlp', 'blocks_0/vo', 'blocks_1/mlp', 'blocks_1/vo']
  """
  if isinstance(which, str) or not which or (unknown := [k for k in which if k not in _MAKERS]):
    shown = which if isinstance(which, str) or not which else unknown
    raise ValueError(
      f'which is a sequence of the pairs {", ".join(map(repr, _MAKERS))}; got {shown!r}.'
    )
  parts = anatomy_of(model) if anatomy is None else anatomy
  if not parts.blocks:
    raise ValueError(f'{type(model).__name__} has no blocks, whose weights could be paired.')
  if set(which) != {'mlp'}:
    _require_thirds(model)
  heads = [None] * len(parts.blocks)
  if per_head and set(which) != {'mlp'}:
    heads = _heads(model, parts.blocks) if num_heads is None else num_heads
    heads = [heads] * len(parts.blocks) if isinstance(heads, int) else list(heads)
    if len(heads) != len(parts.blocks):
      raise ValueError(f'num_heads has {len(heads)} entries for {len(parts.blocks)} blocks.')
  norms = {layer: norm.path for norm in parts.norms for layer in norm.readers}
  pairs = []
  for block, own in zip(parts.blocks, heads):
    for kind in which:
      pair = _MAKERS[kind](block, own)
      if fold_norm:
        pair = _folded(pair, norms, kind)
      pairs.append(pair)
  return tuple(pairs)


def _require_thirds(model: nn.Module) -> None:
  """Raises ValueError for a decoder whose fused projection is not all queries, all keys, all values."""
  if isinstance(model, Bloom):
    raise ValueError(
      "Bloom's fused projection is ordered by head: of its attention no pairs are made, only 'mlp'."
    )
  if isinstance(model, GPT2) and (model.num_kv_heads or model.num_heads) != model.num_heads:
    raise ValueError(
      f'{model.num_kv_heads} heads of keys and values serve {model.num_heads} of queries: of such attention '
      "no pairs are made, only 'mlp'."
    )


def _mlp(block: Block, heads: int | None) -> WeightPair:
  del heads
  first, second = _layers(block, 'mlp')
  return WeightPair(
    f'{block.path}/mlp', Factor(f'{first}/kernel'), Factor(f'{second}/kernel', hidden='in')
  )


def _value_output(block: Block, heads: int | None) -> WeightPair:
  qkv, proj = _layers(block, 'attention')
  value = Factor(f'{qkv}/kernel', (2, 3), heads)
  return WeightPair(f'{block.path}/vo', value, Factor(f'{proj}/kernel', (0, 1), heads, 'in'))


def _key_query(block: Block, heads: int | None) -> WeightPair:
  qkv, _ = _layers(block, 'attention')
  key = Factor(f'{qkv}/kernel', (1, 3), heads)
  return WeightPair(
    f'{block.path}/qk', key, Factor(f'{qkv}/kernel', (0, 3), heads, transposed=True)
  )


_MAKERS = {'mlp': _mlp, 'vo': _value_output, 'qk': _key_query}


def _layers(block: Block, kind: str) -> tuple[str, str]:
  found = [branch.layers for branch in block.branches if branch.kind == kind]
  if len(found) != 1 or len(found[0]) != 2:
    raise ValueError(
      f'{block.path!r} has no {kind} branch of two layers, which a pair is made of; its layers are '
      f'{", ".join(block.layers) or "not told"}.'
    )
  return found[0]


def _folded(pair: WeightPair, norms: Mapping[str, str], kind: Kind) -> WeightPair:
  layer = pair.first.path.removesuffix('/kernel')
  if layer not in norms:
    raise ValueError(
      f'fold_norm: no normalization is known whose output only {layer!r} and its like read.'
    )
  scale = f'{norms[layer]}/scale'
  first = dataclasses.replace(pair.first, norm=scale)
  second = dataclasses.replace(pair.second, norm=scale) if kind == 'qk' else pair.second
  return dataclasses.replace(pair, first=first, second=second)


def _heads(model: nn.Module, blocks: Sequence[Block]) -> int | list[int]:
  if isinstance(model, Classifier | Encoder):
    return _heads(model.backbone, blocks)
  if isinstance(model, ViT | GPT2):
    return model.num_heads
  if isinstance(model, Swin):
    return [heads for heads, depth in zip(model.num_heads, model.depths) for _ in range(depth)]
  raise ValueError(
    f'The heads of {type(model).__name__} are not known: give num_heads, or per_head=False.'
  )


def _leaf(params: PyTree, path: str) -> Array:
  """Returns the parameter at `path`; raises ValueError with the paths that there are."""
  leaf = params
  for key in path.split('/'):
    if not isinstance(leaf, Mapping) or key not in leaf:
      leaves = jax.tree_util.tree_leaves_with_path(params)
      known = [jax.tree_util.keystr(p, simple=True, separator='/') for p, _ in leaves]
      kernels = [name for name in known if name.endswith('kernel')] or known
      raise ValueError(
        f'The parameters have no {path!r}; some of their {len(kernels)} kernels: '
        f'{", ".join(kernels[:8])}.'
      )
    leaf = leaf[key]
  return leaf
