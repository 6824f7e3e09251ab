"""GML: No One Left Behind, Improving the Worst Categories in Long-Tailed Learning (Du & Wu, CVPR 2023).

The mean accuracy hides classes with a recall near zero. GML maximizes the geometric mean over classes of the
soft recall, and needs no more than re-training the classifier of any trained model. Claim: the harmonic mean
and the lowest recall rise by much at an equal mean; an ensemble of old and new classifier is in between.

  python -m experiments.gml
  python -m experiments.gml --config.features=FILE.npz     # your own features instead of images

The file holds `train_features` [records, dim], `train_labels`, `test_features`, `test_labels`.
"""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import launcher, supervised, training
from experiments.long_tail import Trainer, check, draw_recalls, finish, lower, softmax, stage_rows
from experiments.long_tail_data import Sources, load_sources, with_features
from experiments.results import row
from jaxlab.data.long_tail import source_labels
from jaxlab.evaluation.recalls import recall_metrics
from jaxlab.losses.long_tail import adjust_logits, ensemble_probabilities
from jaxlab.models.classifier_heads import tau_normalize

__all__ = ['lower', 'run']


def run(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains the backbone with every classifier of `config.runs`; adds what needs no further training.

  Those are the ensemble of GML's and the old classifier, post-hoc logit adjustment, and tau-normalization
  (none of the latter without validation records and with an empty `config.tau.holdout`).
  """
  config = with_features(config)
  sources = load_sources(config, validation=True)
  check_derived(config, sources)
  trainer = Trainer(config, sources, workdir)
  rows, probabilities = stage_rows(trainer, config.runs)
  old = trainer.outputs('ce')

  def add(name, role, predicted, **metrics):
    probabilities[name] = np.asarray(predicted)
    rows.append(row(name, role, trainer.score(predicted) | metrics))

  if 'gml' in config.runs:
    new, options = trainer.outputs('gml'), config.ensemble
    predicted = ensemble_probabilities(new, old, options.t_new, options.t_old)
    add('ensemble', 'method', predicted)
  add('post-hoc', 'baseline', softmax(adjust_logits(old, sources.counts, config.posthoc_tau)))
  if config.tau.holdout or sources.validation:
    tau = choose_tau(trainer)
    training.say(f'tau-norm: tau {tau:.1f} has the best mean recall on validation records')
    features = trainer.outputs('ce', method='features')
    predicted = softmax(tau_logits(trainer.variables('ce'), features, tau))
    add('tau-norm', 'baseline', predicted, tau=tau)
  draw_recalls(trainer, probabilities, workdir / 'recalls.png')
  return finish(config, rows)


def check_derived(config: ConfigDict, sources: Sources) -> None:
  """Raises ValueError for settings that do not fit together, before anything is trained."""
  if not config.tau.grid or min(config.tau.grid) < 0:
    raise ValueError(f'tau.grid={config.tau.grid}: expected numbers >= 0.')
  blank = np.zeros((1, config.data.num_classes), np.float32)
  try:
    ensemble_probabilities(blank, blank, config.ensemble.t_new, config.ensemble.t_old)
  except ValueError as error:
    raise ValueError(f'ensemble: {error}') from None
  holdout = (config.tau.holdout,) if config.tau.holdout and not sources.validation else ()
  check(
    config,
    sources,
    stages={'all but runs': ('ce',), 'tau.holdout': holdout},
    rows=('ensemble', 'post-hoc', 'tau-norm'),
    metrics=('tau',),
  )
  if holdout and not config.stages[holdout[0]].holdout:
    raise ValueError(f'tau.holdout={holdout[0]!r}: that stage holds nothing out to choose tau on.')


def tau_logits(variables: dict[str, Any], features: np.ndarray, tau: float) -> jnp.ndarray:
  """Returns the logits of a linear classifier with weights `w_c / |w_c|^tau` and without bias."""
  return jnp.asarray(features) @ tau_normalize(variables['params']['head']['kernel'], tau)


def choose_tau(trainer: Trainer) -> float:
  """Returns the tau of `config.tau.grid` with the best mean recall on validation records.

  Published validation images where there are some. Otherwise the network is trained once more without a share
  of every class (the stage `config.tau.holdout`), and that share is the validation: the network of the table
  has seen all training images, on which it would choose tau 0.
  """
  config, published = trainer.config, trainer.sources.validation
  name = 'ce' if published else config.tau.holdout
  source = published or trainer.records(supervised.get_stage(config, name), held_out=True)
  labels, variables = source_labels(source), trainer.variables(name)
  features = trainer.outputs(name, source=source, method='features')

  def mean_recall(tau: float) -> float:
    predictions = np.asarray(tau_logits(variables, features, tau)).argmax(-1)
    return recall_metrics(predictions, labels, config.data.num_classes)['mean']

  found = [mean_recall(tau) for tau in config.tau.grid]
  best = [tau for tau, recall in zip(config.tau.grid, found, strict=True) if recall == max(found)]
  return float(best[len(best) // 2])  # few records tell many values apart badly: the middle one


if __name__ == '__main__':
  launcher.main(run, 'gml')
