"""Long-tailed recognition: imbalanced training sets, balanced test sets, recalls by class."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import pictures, results
from experiments.harness.runs import Variables
from experiments.harness.sections import Recipe
from experiments.harness.settings import found_by, free
from experiments.protocols import classification_losses, stages
from experiments.protocols.long_tail_data import (
  Facts,
  Imbalanced,
  Sources,
  held_out,
  held_out_counts,
  nominal_facts,
)
from experiments.protocols.stages import Stage, Table
from jaxlab import data, evaluation
from jaxlab.evaluation.calibration import expected_calibration_error
from jaxlab.evaluation.recalls import recall_metrics

METRICS = ('mean', 'harmonic', 'geometric', 'lowest', 'many', 'medium', 'few', 'ece')


@dataclasses.dataclass(frozen=True)
class Groups:
  """Classes by training images: above `many`, below `few`; or by rank, where `boundaries` are given."""

  many: int = 100
  few: int = 20
  boundaries: tuple[int, int] | None = None

  def of(self, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the classes with many, medium and few images, bool `[num_classes]` each."""
    if self.boundaries is not None:
      return data.index_groups(counts, self.boundaries)
    return data.shot_groups(counts, self.many, self.few)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Imbalanced):
  """Settings of a long-tail experiment; `groups` are those of its recalls."""

  groups: Groups = free(default_factory=Groups)


def stage(
  config: Settings,
  facts: Facts,
  title: str,
  role: str,
  recipe: Recipe,
  loss: str | stages.Loss = 'cross_entropy',
  options: Mapping[str, Any] | None = None,
  *,
  holdout: float = 0.0,
  **fields: Any,
) -> Stage:
  """Returns a stage on long-tailed records.

  Args:
    config: the settings.
    facts: about the training records.
    title: name of its row.
    role: of its row.
    recipe: of its training.
    loss: a name of `classification_losses.BASELINES`, or a function.
    options: of a baseline.
    holdout: share of each class that it does not see.
    **fields: further ones of `Stage`. On a user's own features there is no backbone for them to name.
  """
  left = facts.counts - held_out_counts(facts.counts, holdout)
  size = int(facts.size * (1 - holdout)) if facts.size != facts.counts.sum() else int(left.sum())
  if holdout:
    fields['records'] = lambda source: held_out(source, facts.counts, holdout, config.seed)[0]
    fields['decides'] = {'holdout': holdout, **fields.get('decides', {})}
  if config.features:
    fields |= {'eval_mode': (), 'pretrained': None}
    for name in ('fresh', 'frozen'):
      fields[name] = tuple(p for p in fields.get(name, ()) if not p.startswith('backbone'))
  own = Stage(title, role, recipe, size, **fields)
  if isinstance(loss, str):
    decides = {'loss': loss, 'loss_options': dict(options or {}), **own.decides}
    loss = classification_losses.baseline(loss, options or {}, left, max(own.steps_per_epoch, 1))
    own = dataclasses.replace(own, decides=decides)
  return dataclasses.replace(own, loss=loss)


def check(
  config: Settings, table: Table, rows: Sequence[str] = (), metrics: Sequence[str] = ()
) -> Iterator[str]:
  """Yields what is wrong with stages, groups and claims.

  Args:
    config: the settings.
    table: the stages.
    rows: patterns of rows that are not titles of stages.
    metrics: patterns of metrics besides `METRICS`.
  """
  yield from stages.check(config, table)
  yield from found_by('groups', config.groups.of, nominal_facts(config.data).counts)
  titles = [own.title for own in table.values() if isinstance(own, Stage)]
  yield from results.check_claims(config, [*map(re.escape, titles), *rows], [*METRICS, *metrics])


class Comparison:
  """Stages that are trained when they are asked for, and rows of what their networks predict.

  Attributes:
    rows: see `results.row`.
    probabilities: predicted probabilities of the test records by the rows' names.
    found: variables by the names of stages; something `Derived` is put in.
  """

  def __init__(self, config: Settings, table: Table, sources: Sources, workdir: pathlib.Path):
    self.config, self.table, self.sources, self.workdir = config, table, sources, workdir
    self.rows: list[dict[str, Any]] = []
    self.probabilities: dict[str, np.ndarray] = {}
    self.found: dict[str, Variables] = {}

  def variables(self, name: str) -> Variables:
    """Returns the variables of a stage, trained if they are not there yet."""

    def evaluate(name: str, variables: Variables) -> dict[str, float]:
      return self.score(softmax(self.outputs(name, variables)))

    given = (self.sources.train, self.workdir, self.found, evaluate)
    return stages.train(self.config, self.table, name, *given)

  def outputs(
    self,
    name: str,
    variables: Variables | None = None,
    source: data.Source | None = None,
    **options: Any,
  ) -> np.ndarray:
    """Returns `stages.outputs` of a stage's network; default: its own variables, the test records."""
    variables = self.variables(name) if variables is None else variables
    source = self.sources.test if source is None else source
    return stages.outputs(self.config, stages.get(self.table, name), variables, source, **options)

  def add(
    self, name: str, role: str, probabilities: jax.typing.ArrayLike, **metrics: float
  ) -> None:
    """Adds the row of some predicted probabilities; `metrics` are further ones."""
    self.probabilities[name] = np.asarray(probabilities)
    self.rows.append(results.row(name, role, self.score(probabilities) | metrics))

  def add_stages(self, names: Sequence[str] | None = None) -> None:
    """Adds the rows of stages; default: of `config.runs`."""
    for name in self.config.runs if names is None else names:
      own = stages.get(self.table, name)
      self.add(own.title, own.role, softmax(self.outputs(name)))

  def score(self, probabilities: jax.typing.ArrayLike) -> dict[str, float]:
    """Returns mean, harmonic, geometric and lowest recall, those of groups, and calibration, in percent.

    A group without classes is left out.
    """
    probabilities, labels = np.asarray(probabilities), self.sources.labels
    predictions = np.asarray(evaluation.predicted_classes(probabilities))
    groups = self.config.groups.of(self.sources.facts.counts)
    found = recall_metrics(predictions, labels, self.config.data.num_classes, groups=groups)
    confidence = np.minimum(
      probabilities.max(-1), 1.0
    )  # a sum of float32 may pass 1 by its last bit
    found['ece'] = float(expected_calibration_error(confidence, predictions == labels).ece)
    return {name: 100 * float(value) for name, value in found.items() if np.isfinite(value)}

  def finish(self, extra: Sequence[str] = (), note: str = '') -> dict[str, Any]:
    """Draws the recalls and returns the results; the table has `extra` metrics and a `note` above it."""
    self.draw(self.workdir / 'recalls.png')
    return results.results(self.config, self.rows, [*METRICS, *extra], f'recalls in %{note}')

  def draw(self, path: pathlib.Path) -> None:
    """Draws the recall of every class for the rows `config.pictured`; classes sorted by training images."""
    names = self.config.pictured or tuple(self.probabilities)
    shown = [name for name in names if name in self.probabilities]
    counts, classes = self.sources.facts.counts, self.config.data.num_classes
    order, places = np.argsort(-counts, kind='stable'), np.arange(classes)
    if not shown:
      return
    with pictures.drawn(path, size=(7.5, 4.2)) as axis:
      for position, name in enumerate(shown):
        predictions = evaluation.predicted_classes(self.probabilities[name])
        confusion = evaluation.confusion_matrix(predictions, self.sources.labels, classes)
        recall = 100 * np.asarray(evaluation.per_class_recall(confusion))[order]
        if classes <= 30:
          width = 0.8 / len(shown)
          axis.bar(places + (position + 0.5) * width - 0.4, recall, width, label=name)
        else:
          axis.plot(places, recall, linewidth=0.8, label=name)
      if classes <= 30:
        axis.set_xticks(places, [f'{c}\n{counts[c]}' for c in order], fontsize=8)
      axis.set_xlabel('class and its training images' if classes <= 30 else 'classes by images')
      axis.set_ylabel('recall (%)')
      axis.set_title(pictures.title(self.config))
      axis.legend(frameon=False, ncols=min(len(shown), 4), loc='upper center', fontsize=8)
      axis.set_ylim(0, 115)
      axis.grid(alpha=0.3, axis='y')


def softmax(logits: jax.typing.ArrayLike) -> np.ndarray:
  """Returns the probabilities of logits `[..., num_classes]`, on the host."""
  return np.asarray(jax.nn.softmax(jnp.asarray(logits), axis=-1))
