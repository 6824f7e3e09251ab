"""Decoding: a step behind a full cache, compiled ahead, and timed next to that of another decoder."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from experiments.harness import costs, networks
from experiments.harness.runs import Call, Variables, say
from jaxlab import models, parallel
from jaxlab.compression import GroupedHeads

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Decoding:
  """The step of decoding that is timed: a token for each sequence, behind a full cache.

  Attributes:
    batch_size: sequences.
    length: tokens of the cache.
    repeats: of the measurement; 0: none.
    partition: rules of the compiled step's weights, pairs (pattern, axes of the mesh), as of a recipe.
  """

  batch_size: int = 8
  length: int = 512
  repeats: int = 5
  partition: tuple[tuple[str, tuple[str | tuple[str, ...] | None, ...]], ...] = ()

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.batch_size < 1 or self.length < 1 or self.repeats < 0:
      yield (
        f'batch_size={self.batch_size}, length={self.length}, repeats={self.repeats}: expected positive '
        'sizes, and a number of repeats or 0.'
      )


def program(sizes: Decoding, make: Callable[[], GroupedHeads]) -> Call:
  """Returns a step of decoding, of variables, a cache that it overwrites, and tokens.

  Weights are split over the mesh by `partition` and the rule for parameters, the cache by sequences, and over
  `tensor` by heads, where they divide.

  Args:
    sizes: of batch and cache.
    make: returns a decoder, called when the step is compiled; shapes of variables are enough.
  """
  return Call(functools.partial(_arguments, sizes, make), donated=(1,))


def _arguments(
  sizes: Decoding, make: Callable[[], GroupedHeads], mesh: jax.sharding.Mesh
) -> tuple[Any, tuple[Any, ...]]:
  own, sharding = make(), networks.calibration_sharding(mesh, sizes.batch_size)
  cache = jax.eval_shape(lambda: own.model.init_cache(sizes.batch_size, sizes.length))

  def place(leaf: Any) -> NamedSharding:
    if leaf.ndim == 4 and leaf.shape[2] % mesh.shape['tensor'] == 0:
      return NamedSharding(mesh, PartitionSpec(*(sharding.spec or [None]), None, 'tensor'))
    return sharding if leaf.ndim else parallel.replicated(mesh)

  variables = parallel.abstract(own.variables, weight_shardings(sizes, own.variables, mesh))
  tokens = jax.ShapeDtypeStruct((sizes.batch_size, 1), jnp.int32, sharding=sharding)
  step = functools.partial(decode, model=own.model, hooks=own.hooks)
  return step, (variables, parallel.abstract(cache, jax.tree.map(place, cache)), tokens)


def weight_shardings(sizes: Decoding, variables: Variables, mesh: jax.sharding.Mesh) -> Any:
  """Returns how the weights of the compiled step lie on a mesh.

  Raises:
    ValueError: for a rule of `partition` that matches nothing, or does not fit what it matches.
  """
  rules = [(pattern, PartitionSpec(*axes)) for pattern, axes in sizes.partition]
  return parallel.fsdp_shardings(variables, mesh, rules)


def decode(
  variables: Variables, cache: Any, tokens: Array, *, model: nn.Module, hooks: Sequence[models.Hook]
) -> tuple[Array, Any]:
  """Returns the most probable next tokens `[batch, 1]`, and the cache behind them."""
  logits, state = models.apply(
    model, {**variables, 'cache': cache}, tokens, hooks=hooks, mutable=['cache']
  )
  return jnp.argmax(logits, axis=-1).astype(jnp.int32), state['cache']


@functools.partial(jax.jit, static_argnames=('model', 'hooks'), donate_argnames='cache')
def again(
  variables: Variables, cache: Any, tokens: Array, *, model: nn.Module, hooks: Sequence[models.Hook]
) -> tuple[Array, Any]:
  """Returns what `decode` does, in the place of the cache, but for its end: the next step is the same one."""
  tokens, new = decode(variables, cache, tokens, model=model, hooks=hooks)
  return tokens, {**new, 'slot': cache['slot'], 'mask': cache['mask']}


def last_slot(cache: Any) -> Any:
  """Returns an empty cache as one that is full but for the slot of the next token."""
  mask = jnp.ones_like(cache['mask']).at[:, -1].set(False)
  return {**cache, 'slot': jnp.int32(mask.shape[1] - 1), 'mask': mask}


def relative_costs(sizes: Decoding, decoders: Sequence[GroupedHeads]) -> list[dict[str, float]]:
  """Returns `cache`, the bytes, and `decode_time`, of a step behind a full cache, over those of the first.

  Decoders of one form, model and hooks, take the same time: it is measured once, in turns with the others.
  A step writes its cache in place, and the next one is given it.
  Without repeats no time is measured, and decoders need no variables.
  """

  def empty(decoder: GroupedHeads) -> Any:
    return decoder.model.init_cache(sizes.batch_size, sizes.length)

  def timed(decoder: GroupedHeads) -> Any:
    variables, cache = jax.tree.map(jnp.asarray, decoder.variables), last_slot(empty(decoder))
    tokens = jnp.zeros((sizes.batch_size, 1), jnp.int32)
    step = functools.partial(again, model=decoder.model, hooks=decoder.hooks)

    def call() -> None:
      nonlocal cache
      _, cache = jax.block_until_ready(step(variables, cache, tokens))

    call()
    return call

  forms: dict[Any, GroupedHeads] = {}
  for decoder in decoders:
    forms.setdefault((decoder.model, decoder.hooks), decoder)
  times = {}
  if sizes.repeats:
    say('time of a step of decoding')
    times = costs.alternate({form: timed(own) for form, own in forms.items()}, sizes.repeats)
  found = []
  for decoder in decoders:
    held = models.cache_bytes(jax.eval_shape(functools.partial(empty, decoder)))
    time = {'decode_time': times[decoder.model, decoder.hooks]} if times else {}
    found.append({'cache': held, **time})
  return [{key: value / found[0][key] for key, value in own.items()} for own in found]
