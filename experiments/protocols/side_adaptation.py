"""Ways to adapt a frozen transformer by what its blocks hand on, without a gradient through any of them."""

from typing import Any, Literal

import jax
from flax import linen as nn

from experiments.protocols.adaptation import Method, Pool
from jaxlab import adapters, models

Array = jax.Array
PyTree = Any

Kind = Literal['attention', 'mlp']
# What a side network consists of: what a module adds, and how one is drawn.
MODULES = {
  'attention': (adapters.low_rank_attention, adapters.init_low_rank_attention),
  'mlp': (adapters.low_rank_mlp, adapters.init_low_rank_mlp),
}


def side_attention(
  model: nn.Module,
  images: Any,
  *,
  pool: Pool,
  rank: int | None = 4,
  gap: int = 1,
  modules: int = 4,
  combine: Literal['before', 'after'] = 'before',
  correction: Literal['running', 'literal', 'none'] = 'running',
  kind: Kind = 'attention',
  remat: bool = False,
) -> Method:
  """Returns a side network of low-rank attention over the tokens of all blocks, as a method.

  The head reads the frozen network's own last norm of what it makes. The network runs in evaluation mode.

  Args:
    model: the network without a classifier.
    images: shape of a batch.
    pool: see `Settings.pool`.
    rank: of a module; None: the network's width.
    gap: blocks of the network to one of the side network.
    modules: of a block.
    combine: see `adapters.apply_attention_side_network`.
    correction: likewise.
    kind: of the modules; an MLP has as many numbers as attention of the rank.
    remat: keep modules' inputs alone for the backward pass.

  Raises:
    ValueError: for another network than a ViT, and for sizes that do not fit.
  """
  read = token_reader(model, pool)
  shape = token_shape(model, images)
  module, init_module = MODULES[kind]

  def init(key: Array, params: PyTree) -> PyTree:
    del params
    return adapters.init_attention_side_network(
      key,
      shape[-1],
      model.depth,
      rank=shape[-1] if rank is None else rank,
      gap=gap,
      modules=modules,
      init=init_module,
    )

  def features(
    tuned: PyTree, variables: PyTree, images: Array, *, train: bool, rngs: dict
  ) -> Array:
    del train, rngs  # what is frozen hands on the same tokens in training
    tokens = adapters.collect_features(model, variables, images, gap=gap)
    made = adapters.apply_attention_side_network(
      tuned, tokens, combine=combine, correction=correction, remat=remat, module=module
    )
    return read(jax.lax.stop_gradient(variables['params']['norm']), made)

  return Method(features, init)


def gathered_attention(
  model: nn.Module,
  images: Any,
  *,
  pool: Pool,
  layers: tuple[int, ...] | None = None,
  rank: int = 16,
  depth: int = 4,
  kind: Kind = 'attention',
) -> Method:
  """Returns an edge network on the sum of all layers' tokens, as a method of the machine that has both.

  Args:
    model: the network without a classifier.
    images: shape of a batch.
    pool: see `Settings.pool`.
    layers: whose tokens are summed; None: all.
    rank: of a module.
    depth: number of modules; 0: none.
    kind: of the modules.

  Raises:
    ValueError: for another network than a ViT, and for sizes that do not fit.
  """
  read, shape = token_reader(model, pool), token_shape(model, images)
  module, init_module = MODULES[kind]

  def init(key: Array, params: PyTree) -> PyTree:
    del params
    edge = adapters.init_edge_network(key, shape[-1], 1, rank=rank, depth=depth, init=init_module)
    return {name: edge[name] for name in ('modules', 'norm')}

  def features(
    tuned: PyTree, variables: PyTree, images: Array, *, train: bool, rngs: dict
  ) -> Array:
    del train, rngs
    tokens = adapters.gather_sum(adapters.collect_features(model, variables, images), layers)
    made = tokens + adapters.run_modules(tuned['modules'], tokens, module=module)
    return read(tuned['norm'], made)

  return Method(features, init)


def token_reader(model: nn.Module, pool: Pool) -> Any:
  """Returns `(norm, tokens) -> [batch, width]`: what the head reads.

  Raises:
    ValueError: for another network than a ViT without distillation token.
  """
  if not isinstance(model, models.ViT) or model.distilled:
    raise ValueError(
      f'Tokens of all blocks are read from a ViT without distillation token, got {type(model).__name__}.'
    )
  kind = 'cls' if pool == 'model' and model.pooling == 'token' else 'mean_patches'
  prefix = model.num_prefix_tokens

  def read(norm: PyTree, tokens: Array) -> Array:
    return adapters.pool_tokens(
      norm, tokens, pool=kind, num_prefix_tokens=prefix, epsilon=model.epsilon
    )

  return read


def token_shape(model: models.ViT, images: Any) -> tuple[int, int]:
  """Returns (tokens, width) of what a block hands on."""
  rows, columns = (size // model.patch_size for size in images.shape[1:3])
  return model.num_prefix_tokens + rows * columns, model.width
