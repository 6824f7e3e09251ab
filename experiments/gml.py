"""GML: No One Left Behind, Improving the Worst Categories in Long-Tailed Learning (Du & Wu, CVPR 2023).

The mean accuracy hides classes with a recall near zero. GML maximizes the geometric mean over classes of the
soft recall, and needs no more than re-training the classifier of any trained model. Claim: the harmonic mean
and the lowest recall rise by much at an equal mean; an ensemble of old and new classifier is in between.

  python -m experiments.gml
  python -m experiments.gml --config=cifar100_lt --workdir=DIR
  python -m experiments.gml --config.features=FILE.npz     # your own features instead of images

The file holds `train_features` [records, dim], `train_labels`, `test_features`, `test_labels`.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.harness import launcher, settings
from experiments.harness.runs import Run, Variables, say
from experiments.harness.sections import Recipe
from experiments.harness.settings import section
from experiments.harness.supervised import Loss
from experiments.protocols import long_tail, long_tail_data, stages
from experiments.protocols.long_tail_data import Facts
from experiments.protocols.stages import CLASSIFIER, Beginning, Stage
from jaxlab import data, evaluation, losses
from jaxlab.evaluation.recalls import recall_metrics
from jaxlab.models.classifier_heads import tau_normalize

# Learnable weight scaling (LWS, Kang et al. 2020): only the classes' factors over a trained classifier.
SCALING = {
  'head': 'scaled',
  'fresh': ('head/scale',),
  'frozen': ('backbone/.*', 'head/kernel', 'head/bias'),
  'eval_mode': ('backbone',),
}


@dataclasses.dataclass(frozen=True)
class GML:
  """The loss: `power` of the geometric mean."""

  power: float = 1.0


@dataclasses.dataclass(frozen=True)
class Ensemble:
  """Temperatures of the new and the old classifier."""

  t_new: float = 1.0
  t_old: float = 1.0


@dataclasses.dataclass(frozen=True)
class Tau:
  """Tau-normalization (Kang et al. 2020).

  Attributes:
    grid: values to choose from.
    holdout: share of every class on which tau is chosen, by a network that has not seen it, where there are
      no published validation records; 0: no tau-normalization there.
  """

  grid: tuple[float, ...] = tuple(round(0.1 * i, 1) for i in range(21))
  holdout: float = 0.2

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not self.grid or min(self.grid) < 0:
      yield f'grid={self.grid}: expected numbers >= 0.'
    if not 0 <= self.holdout < 1:
      yield f'holdout={self.holdout}: expected a share in [0, 1).'


@dataclasses.dataclass(frozen=True)
class Baseline:
  """A network trained by another loss of `classification_losses.BASELINES`.

  `recipe` None: that of the other networks.
  """

  title: str
  loss: str
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  head: str = 'linear'
  recipe: Recipe | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(long_tail.Settings):
  """Settings of GML.

  Attributes:
    runs: rows among 'ce', 'bsce' (networks), 'gml', 'bsce_head', 'crt', 'lws' (classifiers), and `baselines`.
    network: recipe of the networks.
    beginning: what they start from.
    classifier: recipe of the classifiers.
    crt: recipe of cRT; None: as the other classifiers; likewise `lws`.
    gml: the loss.
    ensemble: of the old and the new classifier.
    posthoc_tau: strength of post-hoc logit adjustment.
    tau: tau-normalization.
    baselines: further networks.
  """

  runs: tuple[str, ...] = ('ce', 'bsce', 'gml', 'bsce_head', 'crt', 'lws')
  network: Recipe
  beginning: Beginning = section(Beginning)
  classifier: Recipe
  crt: Recipe | None = None
  lws: Recipe | None = None
  gml: GML = section(GML)
  ensemble: Ensemble = section(Ensemble)
  posthoc_tau: float = 1.0
  tau: Tau = section(Tau)
  baselines: dict[str, Baseline] = dataclasses.field(default_factory=dict)


def gml(config: Settings, counts: np.ndarray) -> Loss:
  """Returns the paper's loss: minus the log of the geometric mean of soft recalls."""
  return lambda logits, labels, seen: losses.gml_loss(
    logits, labels, counts, power=config.gml.power
  )


def table(config: Settings, facts: Facts) -> dict[str, Stage]:
  """Returns all stages: networks from scratch, and classifiers over the cross-entropy network."""

  def network(title, role, *loss, recipe=None, **fields):
    fields = dataclasses.asdict(config.beginning) | fields
    return long_tail.stage(config, facts, title, role, recipe or config.network, *loss, **fields)

  def classifier(title, role, *loss, recipe=None, parts=CLASSIFIER, **fields):
    recipe = recipe or config.classifier
    return long_tail.stage(config, facts, title, role, recipe, *loss, start='ce', **parts, **fields)

  balanced, own = {'sampler': 'class_balanced'}, {'decides': {'gml': config.gml}}
  found = {
    'ce': network('CE', 'baseline'),
    'bsce': network('BSCE', 'reference', 'balanced_softmax'),
    'gml': classifier('CE + GML', 'method', gml(config, facts.counts), **own),
    'bsce_head': classifier('CE + BSCE', 'baseline', 'balanced_softmax'),
    'crt': classifier('cRT', 'baseline', recipe=config.crt, **balanced),
    'lws': classifier('LWS', 'baseline', recipe=config.lws, parts=SCALING, **balanced),
  }
  if config.tau.holdout:
    found['ce_holdout'] = network('CE, held out', 'reference', holdout=config.tau.holdout)
  for name, item in config.baselines.items():
    own = {'head': item.head, 'recipe': item.recipe}
    found[name] = network(item.title, 'reference', item.loss, item.options, **own)
  return found


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  blank, facts = np.zeros((1, 2), np.float32), long_tail_data.nominal_facts(config.data)
  temperatures = config.ensemble.t_new, config.ensemble.t_old
  yield from settings.found_by(
    'ensemble', losses.ensemble_probabilities, blank, blank, *temperatures
  )
  yield from settings.found_by(
    'tau.holdout', long_tail_data.held_out_counts, facts.counts, config.tau.holdout
  )
  if problems := list(settings.found_by('settings', table, config, facts)):
    yield from problems
    return
  rows = ('ensemble', 'post-hoc', 'tau-norm')
  yield from long_tail.check(config, table(config, facts), rows, ['tau'])


def programs(config: Settings, facts: Facts | None = None) -> dict[str, Run]:
  """Returns the trainings by name."""
  facts = facts or long_tail_data.nominal_facts(config.data)
  return stages.programs(config, table(config, facts))


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains the networks with every classifier of `config.runs`; adds what needs no further training.

  Those are the ensemble of GML's and the old classifier, post-hoc logit adjustment, and tau-normalization.
  """
  config = long_tail_data.with_features(config)
  sources = long_tail_data.load(config, validation=True)
  own = table(config, sources.facts)
  settings.require(stages.check(config, own))
  rows = long_tail.Comparison(config, own, sources, workdir)
  rows.add_stages()
  old = rows.outputs('ce')
  if 'gml' in config.runs:
    temperatures = config.ensemble.t_new, config.ensemble.t_old
    mixed = losses.ensemble_probabilities(rows.outputs('gml'), old, *temperatures)
    rows.add('ensemble', 'method', mixed)
  adjusted = losses.adjust_logits(old, sources.facts.counts, config.posthoc_tau)
  rows.add('post-hoc', 'baseline', long_tail.softmax(adjusted))
  if config.tau.holdout or sources.validation:
    tau = choose_tau(config, rows)
    say(f'tau-norm: tau {tau:.1f} has the best mean recall on validation records')
    logits = tau_logits(rows.variables('ce'), rows.outputs('ce', method='features'), tau)
    rows.add('tau-norm', 'baseline', long_tail.softmax(logits), tau=tau)
  return rows.finish()


def tau_logits(variables: Variables, features: np.ndarray, tau: float) -> jnp.ndarray:
  """Returns the logits of a linear classifier with weights `w_c / |w_c|^tau` and without bias."""
  return jnp.asarray(features) @ tau_normalize(variables['params']['head']['kernel'], tau)


def choose_tau(config: Settings, rows: long_tail.Comparison) -> float:
  """Returns the tau of `config.tau.grid` with the best mean recall on validation records.

  Published validation images where there are some. Otherwise the network is trained once more without a share
  of every class, and that share is the validation: the network of the table has seen all training images, on
  which it would choose tau 0.
  """
  name, source = 'ce', rows.sources.validation
  if source is None:
    share = (rows.sources.facts.counts, config.tau.holdout, config.seed)
    name, source = 'ce_holdout', long_tail_data.held_out(rows.sources.train, *share)[1]
  variables, labels = rows.variables(name), data.source_labels(source)
  features = rows.outputs(name, source=source, method='features')

  def mean_recall(tau: float) -> float:
    predictions = evaluation.predicted_classes(tau_logits(variables, features, tau))
    return recall_metrics(predictions, labels, config.data.num_classes)['mean']

  recalls = [mean_recall(tau) for tau in config.tau.grid]
  best = [
    tau for tau, recall in zip(config.tau.grid, recalls, strict=True) if recall == max(recalls)
  ]
  return float(best[len(best) // 2])  # few records tell many values apart badly: the middle one


if __name__ == '__main__':
  launcher.main('gml')
