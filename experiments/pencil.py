"""PENCIL: Deep Learning with Noisy Labels (Yi & Wu, CVPR 2019; TPAMI 2022).

Yi & Wu, arXiv 1903.07788 and 2202.08436. Every training example has label logits of its own, which start at
the given label and are trained along with the network, by the same backward pass:

  1. cross-entropy on the given labels, at a high learning rate;
  2. KL(prediction || label) / C + alpha * compatibility(label, given label) + beta * entropy(prediction) / C;
     network and label logits learn;
  3. KL(prediction || label) / C on the labels as they are corrected by then.

Claim: where plain training ends up memorizing wrong labels, this keeps its accuracy, and as a by-product most
labels are corrected.

  python -m experiments.pencil
  python -m experiments.pencil --config=cifar10_symmetric --workdir=DIR
  python -m experiments.pencil --config=folder --config.data.train_options.root=FOLDER ...   # your own images

It ends with a list of the labels, `labels.csv`: given and corrected one, confidence, doubt. Where images show
several classes, each class is a label of its own with two outcomes (`multi_label`).
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import launcher, results
from experiments.harness.runs import Run, say
from experiments.harness.supervised import Seen, Table
from experiments.protocols import cleaned_labels, noisy_labels
from experiments.protocols.cleaned_labels import Cleaned
from experiments.protocols.noisy_labels import Sources
from jaxlab import data, losses

Array = jax.Array
PyTree = Any

TITLES = {'ce': 'CE', 'pencil': 'PENCIL', 'again': 'PENCIL again'}


@dataclasses.dataclass(frozen=True)
class Pencil:
  """The method.

  Attributes:
    start: epoch at which labels begin to be learned, T1.
    end: epoch from which they stay, T2.
    alpha: weight of the compatibility with the given labels.
    beta: weight of the prediction's entropy.
    rate: step size of the label logits, lambda; their gradient is divided by batch and classes, so an epoch
      moves one by at most `rate / (batch * classes)`.
    scale: label logit of the given label at the beginning, K.
    compatibility: 'code' or 'paper', see `losses.pencil_terms`.
  """

  start: int
  end: int
  alpha: float = 0.1
  beta: float = 0.4
  rate: float = 600.0
  scale: float = 10.0
  compatibility: Literal['code', 'paper'] = 'code'

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not 0 <= self.start <= self.end:
      yield f'start={self.start}, end={self.end}: expected epochs in this order.'
    for name in ('rate', 'scale'):
      if getattr(self, name) <= 0:
        yield f'{name}={getattr(self, name)}: expected a positive number.'
    for name in ('alpha', 'beta'):
      if getattr(self, name) < 0:
        yield f'{name}={getattr(self, name)}: expected at least 0.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(noisy_labels.Settings):
  """Settings of PENCIL.

  Attributes:
    pencil: the method.
    runs: rows among 'ce', 'pencil' and 'again': once more, from the corrected labels (inferred: their
      argmax, a fresh network).
  """

  pencil: Pencil
  runs: tuple[str, ...] = ('ce', 'pencil')


def cross_entropies(logits: Array, labels: Array, seen: Seen) -> Array:
  """Returns each image's binary cross-entropies, averaged over classes."""
  del seen
  return losses.multi_label_bce(logits, labels)


def training(config: Settings, name: str) -> Run:
  """Returns the training of a row."""
  if name == 'ce':
    given = {'loss': cross_entropies} if config.data.multi_label else {}
    return noisy_labels.training_run(config, TITLES[name], **given)
  own, steps = config.pencil, noisy_labels.steps_per_epoch(config)
  several = config.data.multi_label
  terms = {'alpha': own.alpha, 'beta': own.beta, 'compatibility': own.compatibility}

  def joint(logits: Array, label_logits: Array, labels: Array) -> Array:
    return losses.pencil_loss(logits, label_logits, labels, **terms)

  def outcomes(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Returns logits and labels of all outcomes: where an image shows several classes, of there or not."""
    if not several:
      return logits, labels
    return jnp.stack([jnp.zeros_like(logits), logits], -1), labels.astype(jnp.int32)

  def loss(logits: Array, labels: Array, seen: Seen) -> Array:
    label_logits, (logits, labels) = seen.rows['logits'], outcomes(logits, labels)
    return jnp.select(
      [seen.step < own.start * steps, seen.step < own.end * steps],
      [losses.cross_entropy(logits, labels), joint(logits, label_logits, labels)],
      losses.label_distribution_loss(logits, label_logits),
    )

  def update(logits: Array, labels: Array, seen: Seen) -> PyTree:
    logits, labels = outcomes(logits, labels)
    mean = lambda label_logits: jnp.mean(joint(logits, label_logits, labels))  # noqa: E731
    moved = seen.rows['logits'] - own.rate * jax.grad(mean)(seen.rows['logits'])
    learns = (seen.step >= own.start * steps) & (seen.step < own.end * steps)
    return {**seen.rows, 'logits': jnp.where(learns, moved, seen.rows['logits'])}

  table = Table(cleaned_labels.label_shapes(config), update)
  watched = {'labels_correct': cleaned_labels.correct_share} if config.data.noise else {}
  decides = {'pencil': own, 'run': name}
  return noisy_labels.training_run(
    config, TITLES[name], loss=loss, table=table, watched=watched, decides=decides
  )


def rows(config: Settings, sources: Sources) -> PyTree:
  """Returns what the table of records starts with."""
  logits = losses.initial_label_logits(sources.given, config.data.outcomes, config.pencil.scale)
  true = np.full_like(sources.given, -1) if sources.true is None else sources.true
  return {'logits': np.asarray(logits), 'true': true}


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from noisy_labels.check(config)
  metrics = [*noisy_labels.METRICS, 'fall']
  yield from results.check_claims(config, [TITLES[name] for name in TITLES], metrics)
  if unknown := [name for name in config.runs if name not in TITLES]:
    yield f'runs: {unknown} are none of {", ".join(TITLES)}.'
  if not config.runs:
    yield f'runs is empty; runs: {", ".join(TITLES)}.'
  if 'again' in config.runs and 'pencil' not in config.runs:
    yield "runs: 'again' starts from the labels of 'pencil', which is missing."
  if config.pencil.end > config.recipe.epochs:
    yield f'pencil.end={config.pencil.end} exceeds recipe.epochs={config.recipe.epochs}.'
  for name in ('mixup', 'cutmix'):
    if getattr(config.recipe, name):
      yield f'recipe.{name}: expected 0; an example has one label distribution.'
  if config.recipe.microbatches > 1:
    yield 'recipe.microbatches: expected 1; the step of a label is made for the whole batch.'


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings by the names of `config.runs`."""
  del facts
  return {name: training(config, name) for name in config.runs}


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains each row, and writes the corrected labels."""
  sources, plan = noisy_labels.load(config), programs(config)
  say_reach(config)
  found, histories, lines = None, {}, []
  for name, own in plan.items():
    given = sources
    if name == 'again':
      corrected = data.Relabeled(sources.train, found.label)
      given = sources._replace(train=corrected, given=found.label)
    start = None if name == 'ce' else (lambda given: rows(config, given))
    trained = noisy_labels.train(config, own, given, workdir / name, start)
    histories[own.title], scores = trained.history, noisy_labels.scores(trained.history)
    metrics = {**scores, 'fall': scores['best'] - scores['last'], **sources.facts}
    if name != 'ce':
      logits = jax.device_get(trained.state.extra['table']['logits'])
      found = cleaned_labels.cleaned(sources.given, logits)
      metrics |= {} if sources.true is None else {'label_accuracy': found.accuracy(sources.true)}
    lines.append(results.row(own.title, 'baseline' if name == 'ce' else 'method', metrics))
  marks = config.pencil.start, config.pencil.end
  noisy_labels.draw_curves(config, histories, workdir / 'accuracy_over_epochs.png', marks)
  if found is not None:
    report(config, sources, found, workdir)
  return results.results(config, lines, title='accuracies in %')


def report(config: Settings, sources: Sources, found: Cleaned, workdir: pathlib.Path) -> None:
  """Writes the corrected labels and their pictures."""
  cleaned_labels.write_cleaned(workdir, sources.train, found)
  names = sources.train.class_names
  if not config.data.multi_label:
    cleaned_labels.draw_confusion(config, found, names, workdir / 'corrections.png')
  cleaned_labels.draw_suspicious(sources.train, found, workdir / 'suspicious.png')
  changed = int(np.sum(found.label != found.given))
  say(f'{changed} of {found.given.size} labels are corrected: {workdir / "labels.csv"}')


def say_reach(config: Settings) -> None:
  """Says so if label logits cannot move far enough for any label to change."""
  own, batch = config.pencil, config.recipe.batch_size
  entries = batch * config.data.outcomes * int(np.prod(config.data.label_shape))
  reach = own.rate / entries * (own.end - own.start)
  # Both the given label's logit and another's move by at most so much.
  if 2 * reach <= own.scale:
    say(
      f'WARNING: pencil.rate={own.rate:g} moves a label logit by at most {reach:.3g} in '
      f'{own.end - own.start} epochs; the given label leads by {own.scale:g}, so none can change. '
      'Some 20 to 60 are usual.'
    )


if __name__ == '__main__':
  launcher.main('pencil')
