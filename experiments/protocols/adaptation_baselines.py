"""Known ways to adapt a transformer: linear probe, full tuning, BitFit, LoRA, adapters, prompts, SSF."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn

from experiments.protocols.adaptation import Method, Pool, Row
from jaxlab import adapters, models
from jaxlab.models import Hook

Array = jax.Array
PyTree = Any


def hooked(
  model: nn.Module,
  pool: Pool,
  collection: str | None = None,
  hooks: Callable[[bool], Sequence[Hook]] = lambda train: (),
  init: Callable[[Array, PyTree], PyTree] = lambda key, params: {},
  patterns: tuple[str, ...] = (),
) -> Method:
  """Returns the method of hooks around a network.

  Args:
    model: the network without a classifier.
    pool: see `Settings.pool`.
    collection: in which hooks find what `init` drew; None: there is nothing.
    hooks: of whether it is trained.
    init: see `Method`.
    patterns: see `Method`.
  """
  pooling = adapters.mean_patch_hooks(model) if pool == 'mean_patches' else ()

  def features(
    tuned: PyTree, variables: PyTree, images: Array, *, train: bool, rngs: dict
  ) -> Array:
    own = {} if collection is None else {collection: tuned}
    around = [*hooks(train), *pooling]
    return models.apply(model, {**variables, **own}, images, train, hooks=around, rngs=rngs)

  return Method(features, init, patterns)


def linear_probe(model: nn.Module, images: Any, *, pool: Pool) -> Method:
  """Returns the head alone."""
  del images
  return hooked(model, pool)


def full_tuning(model: nn.Module, images: Any, *, pool: Pool) -> Method:
  """Returns the training of the whole network."""
  del images
  return hooked(model, pool, patterns=('.*',))


def bitfit(model: nn.Module, images: Any, *, pool: Pool) -> Method:
  """Returns the training of all biases."""
  del images
  return hooked(model, pool, patterns=('(.*/)?bias',))


def lora(model: nn.Module, images: Any, *, pool: Pool, rank: int = 8, scale: float = 1.0) -> Method:
  """Returns LoRA next to the projections of attention's queries, keys and values."""
  del images
  blocks = models.anatomy(model).blocks
  layers = [
    layer
    for block in blocks
    for branch in block.branches
    if branch.kind == 'attention'
    for layer in branch.layers[:-1]
  ]
  hooks = adapters.lora_hooks(layers, scale)
  init = lambda key, params: adapters.init_lora(key, params, layers, rank)  # noqa: E731
  return hooked(model, pool, 'lora', lambda train: hooks, init)


def adapter(model: nn.Module, images: Any, *, pool: Pool, rank: int = 8) -> Method:
  """Returns adapters behind the MLPs."""
  widths = adapters.block_widths(model, images)
  hooks = adapters.adapter_hooks(model)
  init = lambda key, params: adapters.init_adapters(key, widths, rank)  # noqa: E731
  return hooked(model, pool, 'adapters', lambda train: hooks, init)


def adaptformer(
  model: nn.Module, images: Any, *, pool: Pool, rank: int = 8, scale: float = 0.1
) -> Method:
  """Returns adapters next to the MLPs."""
  widths = adapters.block_widths(model, images)
  hooks = adapters.adaptformer_hooks(model, scale)
  init = lambda key, params: adapters.init_adaptformer(key, widths, rank)  # noqa: E731
  return hooked(model, pool, 'adapters', lambda train: hooks, init)


def prompts(
  model: nn.Module, images: Any, *, pool: Pool, deep: bool, count: int = 10, dropout: float = 0.1
) -> Method:
  """Returns visual prompt tuning, shallow or deep, of a ViT."""
  if not isinstance(model, models.ViT):
    raise ValueError(f'Prompts stand between the tokens of a ViT, got {type(model).__name__}.')
  blocks = models.anatomy(model).block_paths
  width = adapters.block_widths(model, images)[blocks[0]]

  def hooks(train: bool) -> Sequence[Hook]:
    return adapters.prompt_hooks(
      blocks, count, deep=deep, num_prefix_tokens=model.num_prefix_tokens,
      dropout=dropout * train,
    )  # fmt: skip

  def init(key: Array, params: PyTree) -> PyTree:
    del params
    return adapters.init_prompts(
      key, blocks if deep else blocks[:1], count, width, model.patch_size
    )

  return hooked(model, pool, 'prompts', hooks, init)


def ssf(model: nn.Module, images: Any, *, pool: Pool) -> Method:
  """Returns scales and shifts behind all operations."""
  del images
  modules = adapters.ssf_modules(model)
  hooks = adapters.ssf_hooks(modules)
  init = lambda key, params: adapters.init_ssf(key, params, modules)  # noqa: E731
  return hooked(model, pool, 'ssf', lambda train: hooks, init)


def shallow_prompts(model: nn.Module, images: Any, **options: Any) -> Method:
  """Returns prompts in front of the first block."""
  return prompts(model, images, deep=False, **options)


def deep_prompts(model: nn.Module, images: Any, **options: Any) -> Method:
  """Returns prompts in front of every block."""
  return prompts(model, images, deep=True, **options)


BASELINES: dict[str, Row] = {
  'linear': Row('linear probe', 'baseline', linear_probe),
  'full': Row('full tuning', 'baseline', full_tuning),
  'bitfit': Row('BitFit', 'baseline', bitfit),
  'lora': Row('LoRA', 'baseline', lora),
  'adapter': Row('Adapter', 'baseline', adapter),
  'adaptformer': Row('AdaptFormer', 'baseline', adaptformer),
  'vpt_shallow': Row('VPT, shallow', 'baseline', shallow_prompts),
  'vpt_deep': Row('VPT, deep', 'baseline', deep_prompts),
  'ssf': Row('SSF', 'baseline', ssf),
}
