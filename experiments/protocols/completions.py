"""Decoders that learn completions of prompts: their loss, and how they are judged on unseen ones."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness.data import Completions
from experiments.harness.runs import Variables
from experiments.harness.sections import Experiment
from experiments.harness.supervised import Seen
from experiments.harness.tasks import CompletionTask
from jaxlab import data, models
from jaxlab.training import map_batches

Array = jax.Array

METRICS = ('loss', 'exact_match')


def completion_loss(outputs: Array, targets: tuple[Array, Array], seen: Seen) -> Array:
  """Returns the cross-entropy of a token, a mean over all of the batch that count."""
  del seen
  tokens, counted = targets
  each = optax.softmax_cross_entropy_with_integer_labels(outputs, tokens)
  return jnp.sum(jnp.where(counted, each, 0)) / jnp.maximum(jnp.sum(counted), 1)


def judge(
  config: Experiment,
  own: Completions,
  model: nn.Module,
  variables: Variables,
  source: data.Source,
  hooks: Sequence[models.Hook] = (),
) -> dict[str, float]:
  """Returns how well a decoder knows completions.

  `loss`, the cross-entropy of a token of theirs in nats; `exact_match`, the percentage of completions that it
  writes itself, token for token, taking always the most probable one.

  Args:
    config: the experiment.
    own: how the records are read.
    model: the decoder.
    variables: of it.
    source: the records.
    hooks: around its modules.
  """
  found = map_batches(
    functools.partial(
      _judge, variables, model=model, task=CompletionTask.of(own), hooks=tuple(hooks)
    ),
    source,
    batch_size=config.eval_batch_size,
    mesh=config.mesh.make(),
    **harness_data.reading(own, 'test'),
  )
  loss = (found['loss'] * found['count']).sum() / found['count'].sum()
  return {'loss': float(loss), 'exact_match': 100 * float(found['exact'].mean())}


@functools.partial(jax.jit, static_argnames=('model', 'task', 'hooks'))
def _judge(
  variables: Variables, batch: Mapping[str, Any], *, model: nn.Module, task: Any, hooks: Any
) -> dict[str, Array]:
  outputs = models.apply(model, variables, task.inputs(batch), hooks=hooks)
  count = jnp.sum(batch['counted'], -1).astype(jnp.float32)
  return {**task.score(outputs, task.targets(batch)), 'count': count}
