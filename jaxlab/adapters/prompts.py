"""Visual prompt tuning (Jia et al. 2022, arXiv 2203.12119): learned tokens before those of the patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.adapters._trees import at_paths
from jaxlab.models.intercept import Hook, Site, any_of

Array = jax.Array
PyTree = Any

COLLECTION = 'prompts'


def init_prompts(
  key: Array, blocks: Sequence[str], count: int, width: int, patch_size: int = 16
) -> dict[str, PyTree]:
  """Draws prompts, uniform within +-sqrt(6 / (3 patch_size^2 + width)).

  Args:
    key: typed.
    blocks: paths of the blocks in front of which prompts are put: the first (shallow), or all (deep).
    count: prompts in front of a block, at least 1.
    width: channels of a token.
    patch_size: in pixels, of three channels.

  Returns:
    The collection 'prompts': for every block `prompts` `[count, width]`.

  Raises:
    ValueError: for a count below 1, or no block.
  """
  if count < 1 or not blocks:
    raise ValueError(f'count={count}, blocks={tuple(blocks)}: expected at least one of both.')
  bound = math.sqrt(6 / (3 * patch_size**2 + width))
  keys = jax.random.split(key, len(blocks))
  draw = lambda own: jax.random.uniform(own, (count, width), jnp.float32, -bound, bound)  # noqa: E731
  return at_paths({path: {'prompts': draw(own)} for path, own in zip(blocks, keys, strict=True)})


def insert_prompts(tokens: ArrayLike, prompts: ArrayLike, num_prefix_tokens: int = 1) -> Array:
  """Returns tokens with prompts behind the first `num_prefix_tokens`.

  Args:
    tokens: `[batch, tokens, width]`.
    prompts: `[count, width]`, the same for all examples, or `[batch, count, width]`.
    num_prefix_tokens: class token, distillation token, registers.

  Raises:
    ValueError: for shapes that do not fit, or fewer tokens.

  >>> insert_prompts(jnp.zeros((1, 2, 1)), jnp.ones((1, 1)))[0, :, 0].tolist()
  [0.0, 1.0, 0.0]
  """
  tokens, prompts = _checked(tokens, prompts, num_prefix_tokens)
  first, rest = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
  return jnp.concatenate([first, prompts, rest], 1)


def replace_prompts(tokens: ArrayLike, prompts: ArrayLike, num_prefix_tokens: int = 1) -> Array:
  """Returns tokens with others in place of those behind the first `num_prefix_tokens`; see `insert_prompts`.

  >>> replace_prompts(jnp.zeros((1, 3, 1)), jnp.ones((1, 1)))[0, :, 0].tolist()
  [0.0, 1.0, 0.0]
  """
  tokens, prompts = _checked(tokens, prompts, num_prefix_tokens, prompts_there=True)
  last = num_prefix_tokens + prompts.shape[1]
  return jnp.concatenate([tokens[:, :num_prefix_tokens], prompts, tokens[:, last:]], 1)


def prompt_hooks(
  blocks: Sequence[str],
  count: int,
  *,
  deep: bool,
  num_prefix_tokens: int = 1,
  dropout: float = 0.0,
  keep: bool = False,
) -> tuple[Hook, ...]:
  """Returns hooks that put prompts in front of the first block, `deep` others in their place before each.

  Prompts have no position embedding. Behind the last block they are dropped, so that the network pools what
  it pooled.

  Args:
    blocks: paths of all blocks in order, `models.anatomy(model).block_paths`.
    count: prompts in front of a block.
    deep: whether every block has its own.
    num_prefix_tokens: of the model, `ViT.num_prefix_tokens`.
    dropout: of prompts' numbers, drawn for each example from the rng stream 'dropout'; 0 in evaluation.
    keep: whether prompts stay behind the last block.

  Raises:
    ValueError: for no block or prompt, or a dropout outside of [0, 1).
  """
  if not blocks or count < 1 or not 0 <= dropout < 1:
    raise ValueError(
      f'blocks={tuple(blocks)}, count={count}, dropout={dropout}: expected at least one of both, and a rate '
      'in [0, 1).'
    )

  def prompted(site: Site, x: Array) -> Array:
    prompts = site.read('prompts')
    if len(prompts) != count:
      raise ValueError(f'{site.path} has {len(prompts)} prompts, count={count}.')
    if dropout:
      shape = (len(x), *prompts.shape)
      kept = jax.random.bernoulli(site.module.make_rng('dropout'), 1 - dropout, shape)
      prompts = jnp.where(kept, prompts / (1 - dropout), 0)
    put = insert_prompts if site.path == blocks[0] else replace_prompts
    return put(x, prompts, num_prefix_tokens)

  def dropped(site: Site, y: Array) -> Array:
    del site
    return jnp.concatenate([y[:, :num_prefix_tokens], y[:, num_prefix_tokens + count :]], 1)

  first = any_of(blocks if deep else blocks[:1])
  hooks = [Hook(first, input=prompted, collection=COLLECTION)]
  return tuple(hooks if keep else [*hooks, Hook(any_of(blocks[-1:]), output=dropped)])


def _checked(
  tokens: ArrayLike, prompts: ArrayLike, num_prefix_tokens: int, prompts_there: bool = False
) -> tuple[Array, Array]:
  """Returns tokens, and prompts for each example; raises ValueError if they do not fit."""
  tokens, prompts = jnp.asarray(tokens), jnp.asarray(prompts)
  fits = tokens.ndim == 3 and prompts.ndim in (2, 3) and tokens.shape[-1] == prompts.shape[-1]
  if not fits or (prompts.ndim == 3 and len(prompts) != len(tokens)):
    raise ValueError(
      f'Expected tokens [batch, tokens, width] and prompts [count, width] or [batch, count, width], got '
      f'{tokens.shape} and {prompts.shape}.'
    )
  least = num_prefix_tokens + prompts_there * prompts.shape[-2]
  if tokens.shape[1] < least:
    raise ValueError(f'{tokens.shape[1]} tokens: expected at least {least}.')
  prompts = jnp.broadcast_to(prompts.astype(tokens.dtype), (len(tokens), *prompts.shape[-2:]))
  return tokens, prompts
