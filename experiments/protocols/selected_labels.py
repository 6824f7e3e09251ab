"""Examples with noisy labels of which some are kept, corrected or left out: what becomes of them.

A table of records holds `label`, `keep` and `corrected` of each. Networks are judged by recalls, as classes
may be unequal.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness.runs import Variables
from experiments.harness.tasks import ImageTask
from experiments.protocols import noisy_labels
from experiments.protocols.noisy_labels import Settings, Sources
from jaxlab import data, evaluation
from jaxlab.training import map_batches

Array = jax.Array

# What examples are, by the noise that was put on them.
KINDS = {'clean': 'clean labels', 'closed': 'closed noise', 'open': 'open noise'}


def recalls(config: Settings, test: data.Source) -> Callable[[Variables], dict[str, float]]:
  """Returns `variables -> yardsticks` on the test records in %; `test` is the mean recall."""
  model, labels = noisy_labels.network(config), data.source_labels(test)

  def evaluate(variables: Variables) -> dict[str, float]:
    predicted = map_batches(
      functools.partial(_predicted, variables, model=model, task=config.task),
      test,
      batch_size=config.eval_batch_size,
      mesh=config.mesh.make(),
      **harness_data.reading(config.data, 'test'),
    )
    found = evaluation.imbalanced_metrics(predicted, labels, config.data.num_classes)
    return {'test': 100 * found['macro_recall'], **{k: 100 * v for k, v in found.items()}}

  return evaluate


@functools.partial(jax.jit, static_argnames=('model', 'task'))
def _predicted(
  variables: Variables, batch: Mapping[str, Array], *, model: nn.Module, task: ImageTask
) -> Array:
  """Returns the predicted class of each record."""
  return jnp.argmax(model.apply(variables, task.inputs(batch), train=False), -1)


def right(table: Mapping[str, np.ndarray], sources: Sources) -> dict[str, float]:
  """Returns the shares of right labels in % among kept examples and, if there are any, corrected ones."""
  rows = {name: leaf[: len(sources.given)] for name, leaf in table.items()}
  correct = rows['label'] == sources.true
  found = {'kept_right': 100 * float(np.mean(correct[rows['keep']]))}
  if rows['corrected'].any():
    found['corrected_right'] = 100 * float(np.mean(correct[rows['corrected']]))
  return found


def left_out(table: Mapping[str, np.ndarray], sources: Sources) -> dict[str, float]:
  """Returns the share of examples that are left out, in %, of each kind that there is, see `KINDS`."""
  out = ~table['keep'][: len(sources.given)]
  is_open, clean = sources.true == -1, sources.true == sources.given
  kinds = {'clean': clean, 'closed': ~clean & ~is_open, 'open': is_open}
  return {kind: 100 * float(np.mean(out[own])) for kind, own in kinds.items() if own.any()}
