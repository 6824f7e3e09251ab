"""Networks as users bring them, each with one thing that methods around a network stumble over.

All are a few blocks of width 8, so that every method runs on every network within seconds.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from models.random_variables import random_variables

from jaxlab.models import Anatomy, HookPoint, Norm

WIDTH, VOCABULARY, LENGTH, PAD = 8, 13, 6, 0
BLOCKS = ('block_0', 'block_1')


@dataclasses.dataclass(frozen=True)
class Network:
  """A model with all that a method needs.

  Attributes:
    model: Linen module.
    variables: of it.
    batches: for calibration.
    anatomy: names of its parts.
    counted: which positions of a batch count.
    plain: the same function without transformations, for tests that look into it; None: the model.
  """

  model: nn.Module
  variables: Mapping[str, Any]
  batches: Sequence[Any]
  anatomy: Anatomy
  counted: Callable[..., Any] | None = None
  plain: nn.Module | None = None

  @property
  def reference(self) -> nn.Module:
    """The function without transformations."""
    return self.plain or self.model


class MLPBlock(nn.Module):
  """A residual branch behind a norm."""

  @nn.compact
  def __call__(self, x):
    y = nn.LayerNorm(name='norm')(x)
    y = nn.relu(nn.Dense(2 * WIDTH, name='fc1')(y))
    return x + nn.Dense(WIDTH, name='fc2')(y)


class SharedLayerBlock(nn.Module):
  """Calls one layer twice, the second time on values ten times as large."""

  @nn.compact
  def __call__(self, x):
    layer = nn.Dense(WIDTH, name='shared')
    y = nn.relu(layer(nn.LayerNorm(name='norm')(x)))
    return x + 0.1 * nn.Dense(WIDTH, name='out')(layer(10 * y))


class HeadsBlock(nn.Module):
  """Attention as in `nn.MultiHeadDotProductAttention`: maps to and from heads."""

  @nn.compact
  def __call__(self, x):
    y = nn.LayerNorm(name='norm')(x)
    q, k, v = (nn.DenseGeneral((2, WIDTH // 2), name=name)(y) for name in ('q', 'k', 'v'))
    weights = nn.softmax(jnp.einsum('bqhd,bkhd->bhqk', q, k) / 2)
    y = jnp.einsum('bhqk,bkhd->bqhd', weights, v)
    return x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name='out')(y)


class ParallelBlock(nn.Module):
  """Two branches that read one norm, as in GPT-J and PaLM."""

  @nn.compact
  def __call__(self, x):
    y = nn.LayerNorm(name='norm')(x)
    a = nn.Dense(WIDTH, name='a2')(nn.tanh(nn.Dense(WIDTH, name='a1')(y)))
    b = nn.Dense(WIDTH, name='b2')(nn.relu(nn.Dense(WIDTH, name='b1')(y)))
    return x + a + b


class KeywordBlock(nn.Module):
  """Called by keywords, of which the activations are not alphabetically first; calls its layers so."""

  @nn.compact
  def __call__(self, x, attention_bias, gain: float = 1.0):
    y = nn.LayerNorm(name='norm')(x=x)
    y = nn.relu(nn.Dense(2 * WIDTH, name='fc1')(inputs=y)) + attention_bias
    return x + gain * nn.Dense(WIDTH, name='fc2')(inputs=y)


class TupleBlock(nn.Module):
  """Returns counters, activations, nothing and a flag."""

  @nn.compact
  def __call__(self, x):
    y = MLPBlock(name='inner')(x)
    return jnp.arange(3), y, None, 7


class NestedBlock(nn.Module):
  """Has a layer and a block in it."""

  remat = False

  @nn.compact
  def __call__(self, x):
    layer, block = map(nn.remat, (nn.Dense, MLPBlock)) if self.remat else (nn.Dense, MLPBlock)
    return block(name='inner')(layer(WIDTH, name='fc0')(x))


class RematBlock(NestedBlock):
  """Computes its parts again in the backward pass."""

  remat = True


class MaskedBlock(nn.Module):
  """Attention that does not look at padding."""

  @nn.compact
  def __call__(self, x, mask):
    y = nn.LayerNorm(name='norm')(x)
    q, k, v = jnp.split(nn.Dense(3 * WIDTH, name='qkv')(y), 3, -1)
    q, k, v = (HookPoint(name=n)(a) for n, a in (('query', q), ('key', k), ('value', v)))
    scores = jnp.where(mask[:, None, :], jnp.einsum('bqd,bkd->bqk', q, k) / 3, -1e9)
    weights = HookPoint(name='softmax')(nn.softmax(scores)[:, None])[:, 0]
    x = x + nn.Dense(WIDTH, name='proj')(jnp.einsum('bqk,bkd->bqd', weights, v))
    return MLPBlock(name='mlp')(x)


class Expert(nn.Module):
  """A layer that reads its own tokens."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(WIDTH, name='fc')(x)


class ExpertsBlock(nn.Module):
  """Experts under `nn.vmap`, which carries all collections; the last one gets no token that is not 0."""

  @nn.compact
  def __call__(self, x):
    gates = jnp.stack([x[..., 0] > 0, x[..., 0] <= 0, jnp.zeros_like(x[..., 0], bool)])
    experts = nn.vmap(
      Expert,
      variable_axes={'params': 0, 'quantization': 0, 'ranges': 0},
      split_rngs={'params': True},
    )(name='experts')
    y = experts(jnp.where(gates[..., None], x, 0))
    return x + jnp.sum(jnp.where(gates[..., None], y, 0), 0)


class Plain(nn.Module):
  """Blocks between a stem and a head, on vectors or tokens.

  Attributes:
    block: of the blocks.
    keywords: whether they are called by keywords.
    scan: whether they are one block, its variables stacked.
  """

  block: type[nn.Module] = MLPBlock
  keywords: bool = False
  scan: bool = False

  @nn.compact
  def __call__(self, x, gain: float = 1.0):
    x = nn.Dense(WIDTH, name='stem')(x)
    if self.scan:
      body = nn.scan(
        lambda module, x, _: (module(x), None),
        variable_axes={'params': 0, 'quantization': 0, 'ranges': 0},
        split_rngs={'params': True},
        length=len(BLOCKS),
      )
      x, _ = body(self.block(name='blocks'), x, None)
    else:
      for name in BLOCKS:
        if self.keywords:
          x = self.block(name=name)(x=x, attention_bias=0.1, gain=gain)
        else:
          x = self.block(name=name)(x)
        x = x[1] if isinstance(x, tuple) else x
    return nn.Dense(5, name='head')(x)


class Text(nn.Module):
  """Token embeddings, blocks with a mask, and the table once more as the head's kernel."""

  @nn.compact
  def __call__(self, tokens, mask=None):
    embed = nn.Embed(VOCABULARY, WIDTH, name='embed')
    x = embed(tokens)
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    for name in BLOCKS:
      x = MaskedBlock(name=name)(x, mask=mask)
    return embed.attend(nn.LayerNorm(name='norm')(x))


def _anatomy(norms: Mapping[str, Sequence[str]] = {}, **fields: Any) -> Anatomy:
  """Returns the anatomy of a network of blocks, all with the same norms and readers."""
  found = [
    Norm(f'{b}/{n}', readers=[f'{b}/{r}' for r in own]) for b in BLOCKS for n, own in norms.items()
  ]
  return Anatomy(
    **{'stem': ('stem',), 'blocks': BLOCKS, 'head': ('head',), 'norms': found, **fields}
  )


def _vectors(*sizes: int, dead: bool = False) -> list[np.ndarray]:
  rng = np.random.default_rng(0)
  batches = [rng.normal(size=(size, LENGTH, WIDTH)).astype(np.float32) for size in sizes]
  for batch in batches:
    batch[..., 2] *= not dead
  return batches


def _tokens(*sizes: int) -> list[dict[str, np.ndarray]]:
  """Returns lines of different length."""
  rng = np.random.default_rng(0)
  batches = []
  for size in sizes:
    mask = np.arange(LENGTH) < rng.integers(2, LENGTH + 1, (size, 1))
    tokens = np.where(mask, rng.integers(1, VOCABULARY, mask.shape), PAD).astype(np.int32)
    batches.append({'tokens': tokens, 'mask': mask})
  return batches


def _plain(block: type[nn.Module] = MLPBlock, **fields: Any) -> tuple[nn.Module, Any, list]:
  model, batches = Plain(block, **fields), _vectors(16, 16)
  return model, random_variables(model, batches[0]), batches


def _dead_channel() -> Network:
  model, variables, batches = _plain()
  params = jax.tree.map(jnp.asarray, variables['params'])
  for name in BLOCKS:
    own = params[name]['fc1']
    own['kernel'], own['bias'] = own['kernel'].at[:, 3].set(0), own['bias'].at[3].set(0)
  return Network(model, {'params': params}, batches, _anatomy({'norm': ['fc1']}))


def _text(masked: bool) -> Network:
  model, batches = Text(), _tokens(16, 16)
  variables = random_variables(model, batches[0]['tokens'])
  table = jnp.asarray(variables['params']['embed']['embedding'])
  if masked:  # padding is far out, so that nobody overlooks it
    table = table.at[PAD].set(40 * jnp.sign(table[PAD]))
  else:
    batches = [batch['tokens'] for batch in batches]
  params = {**variables['params'], 'embed': {'embedding': table}}
  parts = _anatomy(
    {'norm': ['qkv'], 'mlp/norm': ['mlp/fc1']},
    stem=(), head=(), embeddings=('embed',), tied='embed', features='norm',
  )  # fmt: skip
  return Network(model, {'params': params}, batches, parts, 'mask' if masked else None)


def _of(block: type[nn.Module], norms: Mapping[str, Sequence[str]] = {}, **fields: Any) -> Network:
  model, variables, batches = _plain(block, **fields)
  return Network(model, variables, batches, _anatomy(norms))


def _scan() -> Network:
  model, variables, batches = _plain(scan=True)
  return Network(model, variables, batches, _anatomy(blocks=('blocks',)))


NETWORKS: dict[str, Callable[[], Network]] = {
  'shared layer': lambda: _of(SharedLayerBlock, {'norm': ['shared']}),
  'tied head': lambda: _text(masked=False),
  'DenseGeneral': lambda: _of(HeadsBlock, {'norm': ['q', 'k', 'v']}),
  'parallel block': lambda: _of(ParallelBlock, {'norm': ['a1', 'b1']}),
  'keyword calls': lambda: _of(KeywordBlock, {'norm': ['fc1']}, keywords=True),
  'tuple outputs': lambda: _of(TupleBlock, {'inner/norm': ['inner/fc1']}),
  'dead channel': _dead_channel,
  'dead input': lambda: dataclasses.replace(
    _of(MLPBlock, {'norm': ['fc1']}), batches=_vectors(16, 16, dead=True)
  ),
  'mask': lambda: _text(masked=True),
  'last partial batch': lambda: dataclasses.replace(
    _of(MLPBlock, {'norm': ['fc1']}), batches=_vectors(16, 16, 5)
  ),
  'scan': _scan,
  'vmap experts': lambda: _of(ExpertsBlock),
  'remat': lambda: dataclasses.replace(
    _of(nn.remat(RematBlock), {'inner/norm': ['inner/fc1']}), plain=Plain(NestedBlock)
  ),
}

METHODS = (
  'ptq', 'absmax_ptq', 'percentile_ptq', 'repq', 'gptq_ptq', 'lsq', 'range_qat', 'activation_qat', 'QwT',
  'QwTv2', 'NBC', 'integer_network',
)  # fmt: skip
INPUTS = METHODS[1:]  # methods that quantize inputs, or follow one that does

STACKED = 'kernels of one path for several layers: `unstack_blocks`, or `ptq`'
# What is refused: the message, and in short why.
REFUSED = {
  **{(own, 'scan'): ('kernels of blocks/fc1, .* are stacked', STACKED) for own in INPUTS},
  **{
    (own, 'vmap experts'): ('kernels of block_0/experts/fc, .* are stacked', STACKED)
    for own in INPUTS
  },
  ('repq', 'shared layer'): (
    "'block_0/shared' is called 2 times, not always on the norm 'block_0/norm'",
    'a kernel takes the scale of one norm: leave the norm out of the pairs',
  ),
  ('QwTv2', 'shared layer'): (
    "'block_0/shared' is called twice",
    'one scale and shift cannot serve two calls: choose other modules, or whole blocks',
  ),
}

BEGIN, END = '<!-- awkward networks -->', '<!-- end of awkward networks -->'


def table() -> str:
  """Returns the matrix as Markdown: methods and networks, each a result or an error that names the module."""
  reasons = list(dict.fromkeys(reason for _, reason in REFUSED.values()))
  rows = [['', *METHODS], ['---'] * (1 + len(METHODS))]
  for name in NETWORKS:
    refused = (REFUSED.get((method, name)) for method in METHODS)
    rows.append([name, *(f'no ({reasons.index(own[1]) + 1})' if own else 'yes' for own in refused)])
  lines = [f'| {" | ".join(row)} |' for row in rows]
  notes = [
    f'{i + 1}. Refused by an error with the name: {reason}.' for i, reason in enumerate(reasons)
  ]
  return '\n'.join([*lines, '', *notes])


def write_table(page: str) -> str:
  """Returns a page with the matrix in its place."""
  before, _, rest = page.partition(BEGIN)
  return f'{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}'
