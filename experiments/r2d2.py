"""R2-D2: Repetitive Reprediction Deep Decipher for Semi-Supervised Learning (Wang & Wu, AAAI 2020).

Wang & Wu, arXiv 1908.04345 (extended: 2202.08955). Every image has pseudo-label logits, which those with a
label keep and all others learn along with the network, by the same backward pass:

  1. cross-entropy on the labeled images; what this network predicts are the first pseudo-labels;
  2. D2: alpha * KL(prediction || pseudo-label) + beta * entropy(prediction); network and pseudo-labels learn.
     Pseudo-labels end as a power of the predictions below 1: flatter ones;
  3. R2-D2: the same, but every few epochs pseudo-labels become what the network predicts by then, and the
     learning rate falls;
  4. cross-entropy on all images with hard labels: what the network predicts by then.

Claim: one network without consistency losses or teachers gains from unlabeled images what those gain; a
reprediction sharpens the labels that D2 flattens.

  python -m experiments.r2d2
  python -m experiments.r2d2 --config=cifar10_shake_shake --workdir=DIR
  python -m experiments.r2d2 --config.runs=supervised,d2     # without reprediction
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import launcher, pictures, results, runs
from experiments.harness.runs import Run, Trained, Variables, say, variables_of
from experiments.harness.sections import Recipe
from experiments.harness.supervised import Seen, Table
from experiments.protocols import semi_supervised
from experiments.protocols.semi_supervised import Sources
from jaxlab import data, losses
from jaxlab.training import TrainState

Array = jax.Array
PyTree = Any

TITLES = {
  'supervised': 'Supervised',
  'longer': 'Supervised, as many steps',
  'd2': 'D2',
  'r2d2': 'R2-D2',
}
METRICS = (
  'accuracy', 'before_tuning', 'label_accuracy', 'entropy', 'relative_entropy', 'drop', 'rise',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Decipher:
  """The method.

  Attributes:
    labeled_batch: labeled images of a batch; all others are unlabeled, of which an epoch is made.
    repredict: epochs behind which pseudo-labels are predicted anew.
    alpha: weight of the divergence from the pseudo-labels.
    beta: weight of the prediction's entropy.
    rate: step size of pseudo-label logits, lambda. Their gradient is divided by the batch: what counts is
      `rate * alpha / batch_size`.
    kind: of the divergence, see `losses.d2_loss`.
    scale: logit of a given label.
  """

  labeled_batch: int
  repredict: tuple[int, ...]
  alpha: float = 0.1
  beta: float = 0.03
  rate: float = 4000.0
  kind: Literal['kl_reverse', 'kl', 'mse'] = 'kl_reverse'
  scale: float = 10.0

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.alpha <= 0 or not 0 <= self.beta < self.alpha:
      yield (
        f'alpha={self.alpha}, beta={self.beta}: expected 0 <= beta < alpha; pseudo-labels are predictions to '
        'the power 1 - beta / alpha.'
      )
    for name in ('rate', 'scale'):
      if getattr(self, name) <= 0:
        yield f'{name}={getattr(self, name)}: expected a positive number.'
    if list(self.repredict) != sorted(set(self.repredict)) or min(self.repredict, default=1) < 1:
      yield f'repredict={self.repredict}: expected increasing numbers of finished epochs.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(semi_supervised.Settings):
  """Settings of R2-D2.

  Attributes:
    supervised: training on the labeled images.
    decipher: training with pseudo-labels; its epochs are passes over the unlabeled images.
    tuning: training on all images with hard labels.
    method: the method.
    runs: rows among 'supervised', 'd2' (never repredicts), 'r2d2', and 'longer': supervised, for as many
      steps as the others take in all.
  """

  supervised: Recipe
  decipher: Recipe
  tuning: Recipe
  method: Decipher
  runs: tuple[str, ...] = ('supervised', 'd2', 'r2d2')


def steps_per_epoch(config: Settings) -> dict[str, int]:
  """Returns the optimizer steps of an epoch of each training."""
  unlabeled = config.decipher.batch_size - config.method.labeled_batch
  return {
    'supervised': max(config.num_labeled // config.supervised.batch_size, 1),
    'decipher': max(config.num_unlabeled // max(unlabeled, 1), 1),
    'tuning': max(config.data.train_size // config.tuning.batch_size, 1),
  }


def supervised(config: Settings, name: str = 'supervised') -> Run:
  """Returns the training on labeled images alone; 'longer': for as many steps as all others together."""
  recipe, steps = config.supervised, steps_per_epoch(config)
  if name == 'longer':
    total = sum(getattr(config, part).epochs * steps[part] for part in steps)
    epochs = round(total / steps['supervised'])
    rate = recipe.schedule
    if rate.decay_epochs is not None:
      longer = rate.decay_epochs * epochs / recipe.epochs
      rate = dataclasses.replace(rate, decay_epochs=longer)
    recipe = dataclasses.replace(recipe, epochs=epochs, schedule=rate)
  return semi_supervised.training_run(config, TITLES[name], recipe, steps['supervised'])


def decipher(config: Settings, name: str) -> Run:
  """Returns the training of a row with pseudo-labels."""
  own, steps = config.method, steps_per_epoch(config)['decipher']

  def d2(logits: Array, pseudo_logits: Array) -> Array:
    return losses.d2_loss(logits, pseudo_logits, own.alpha, own.beta, kind=own.kind)

  def loss(logits: Array, labels: Array, seen: Seen) -> Array:
    del labels  # Hidden ones are among them; given ones are in the table.
    return d2(logits, seen.rows['logits'])

  def update(logits: Array, labels: Array, seen: Seen) -> PyTree:
    del labels
    rows, labeled = seen.rows['logits'], seen.rows['labeled'][:, None]
    gradient = jax.grad(lambda rows: jnp.mean(d2(logits, rows)))(rows)
    return {**seen.rows, 'logits': jnp.where(labeled, rows, rows - own.rate * gradient)}

  epochs = own.repredict if name == 'r2d2' else ()
  return semi_supervised.training_run(
    config,
    TITLES[name],
    # Behind every epoch the entropy of pseudo-labels is looked at.
    dataclasses.replace(config.decipher, eval_every=steps),
    steps,
    augment=dataclasses.replace(config.augment, cutout=0),
    loss=loss,
    table=Table(semi_supervised.pseudo_label_shapes(config), update),
    decides={'method': own, 'start': supervised(config).identity},
    revise_at=tuple(epoch * steps for epoch in epochs),
    sampler=semi_supervised.sampler(config, config.decipher.batch_size, own.labeled_batch),
  )


def tuning(config: Settings, name: str) -> Run:
  """Returns the training of a row on hard labels."""
  start, steps = decipher(config, name), steps_per_epoch(config)['tuning']
  title = f'{TITLES[name]}, hard labels'
  return semi_supervised.training_run(
    config, title, config.tuning, steps, decides={'start': start.identity}
  )


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  problems = list(semi_supervised.check(config))
  yield from problems
  yield from results.check_claims(config, list(TITLES.values()), METRICS)
  if unknown := [name for name in config.runs if name not in TITLES]:
    yield f'runs: {unknown} are none of {", ".join(TITLES)}.'
  if not config.runs:
    yield f'runs is empty; runs: {", ".join(TITLES)}.'
  if problems:
    return
  own, batch = config.method, config.decipher.batch_size
  if not 0 < own.labeled_batch < batch:
    yield f'method.labeled_batch={own.labeled_batch}: expected 1 to {batch - 1}, a part of a batch.'
  elif own.labeled_batch > config.num_labeled:
    yield f'method.labeled_batch={own.labeled_batch} exceeds the {config.num_labeled} labeled images.'
  elif batch - own.labeled_batch > config.num_unlabeled:
    yield f'decipher.batch_size={batch} exceeds the {config.num_unlabeled} unlabeled images.'
  if max(own.repredict, default=0) >= config.decipher.epochs:
    yield f'method.repredict={own.repredict}: expected epochs below {config.decipher.epochs}.'
  if not own.repredict and 'r2d2' in config.runs:
    yield "method.repredict is empty; without reprediction it is the run 'd2'."
  for name in ('mixup', 'cutmix'):
    if getattr(config.decipher, name):
      yield f'decipher.{name}: expected 0; an image has one pseudo-label.'
  if config.decipher.microbatches > 1:
    yield 'decipher.microbatches: expected 1; the step of a pseudo-label is made for the whole batch.'
  sizes = {
    'supervised': config.num_labeled,
    'decipher': steps_per_epoch(config)['decipher'] * batch,
    'tuning': config.data.train_size,
  }
  for key, size in sizes.items():
    yield from semi_supervised.check_recipe(config, key, getattr(config, key), size)


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns all trainings by name; those with pseudo-labels start from 'supervised'."""
  del facts
  found = {'supervised': supervised(config)}
  if 'longer' in config.runs:
    found['longer'] = supervised(config, 'longer')
  for name in ('d2', 'r2d2'):
    if name in config.runs:
      found |= {name: decipher(config, name), f'{name}_tuning': tuning(config, name)}
  return found


def predicted(
  config: Settings, sources: Sources, state: TrainState, variables: Variables | None = None
) -> TrainState:
  """Returns a state whose unlabeled images have predictions as pseudo-labels; None: of its own network."""
  classes, scale = config.data.num_classes, config.method.scale
  given = np.asarray(losses.initial_label_logits(sources.given, classes, scale))
  variables = variables_of(state) if variables is None else variables
  logits = semi_supervised.predict(config, variables, sources.train)
  return semi_supervised.with_pseudo_labels(state, sources, given, logits)


def train_deciphering(
  config: Settings, run: Run, sources: Sources, start: Variables, folder: pathlib.Path
) -> Trained:
  """Returns what a training with pseudo-labels ends with.

  Args:
    config: the settings.
    run: of `decipher`.
    sources: the data.
    start: variables of the supervised network, which predicts the first pseudo-labels.
    folder: of this run.
  """
  return runs.train(
    run,
    sources.train,
    folder,
    start=start,
    begin=functools.partial(predicted, config, sources, variables=start),
    evaluate=lambda variables: {'test': semi_supervised.accuracy(config, variables, sources.test)},
    inspect=functools.partial(inspect, config, run, sources),
    revise=functools.partial(predicted, config, sources),
  )


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains each row, through all of its stages."""
  say_oscillation(config)
  sources, plan = semi_supervised.load(config), programs(config)
  test = lambda variables: semi_supervised.accuracy(config, variables, sources.test)  # noqa: E731
  trained, rows = {}, {}
  for name in ('supervised', 'longer'):
    if name in plan:
      trained[name] = runs.train(plan[name], sources.labeled_records, workdir / name)
      rows[name] = {'accuracy': test(trained[name].variables)}
  for name in ('d2', 'r2d2'):
    if name not in plan:
      continue
    start = trained['supervised'].variables
    own = train_deciphering(config, plan[name], sources, start, workdir / name)
    state = predicted(config, sources, own.state) if name == 'r2d2' else own.state
    hard = semi_supervised.pseudo_labels(config, state)
    hard = np.where(sources.labeled, sources.labels, hard)
    tuned = runs.train(
      plan[f'{name}_tuning'],
      data.Relabeled(sources.train, hard),
      workdir / f'{name}_tuning',
      start=own.variables,
    )
    trained[name], rows[name] = (
      own,
      {
        'accuracy': test(tuned.variables),
        'before_tuning': looked_at(own)[-1]['test'],
        'label_accuracy': sources.accuracy(hard),
        **entropies(config, own),
      },
    )
    if not jax.process_index():
      np.savez_compressed(workdir / f'{name}_labels.npz', label=hard, labeled=sources.labeled)
  for found in rows.values():
    if 'entropy' in found and 'd2' in rows:
      found['relative_entropy'] = 100 * found['entropy'] / rows['d2']['entropy']
  if curves := {name: trained[name] for name in ('d2', 'r2d2') if name in trained}:
    draw(config, rows, curves, workdir / 'entropy_and_accuracy.png')
  lines = [
    results.row(TITLES[name], 'method' if name == 'r2d2' else 'baseline', rows[name])
    for name in TITLES
    if name in rows and name in config.runs
  ]
  return results.results(config, lines, METRICS, 'accuracies in %, entropies in nats')


def inspect(config: Settings, run: Run, sources: Sources, state: TrainState) -> dict[str, float]:
  """Returns the mean entropy of pseudo-labels, and how many are right.

  Also `entropy_behind`, that of the predictions, where they take the place of pseudo-labels behind this step.
  """
  entropy = functools.partial(semi_supervised.mean_entropy, labeled=sources.labeled)
  found = {
    'entropy': entropy(state.extra['table']['logits']),
    'label_accuracy': sources.accuracy(semi_supervised.pseudo_labels(config, state)),
  }
  if int(state.step) in run.revise_at:
    logits = semi_supervised.predict(config, variables_of(state), sources.train)
    found['entropy_behind'] = entropy(logits)
  return found


def looked_at(trained: Trained) -> list[Mapping[str, float]]:
  """Returns the rows of a training's history that tell of its pseudo-labels."""
  return [line for line in trained.history if 'entropy' in line]


def entropies(config: Settings, trained: Trained) -> dict[str, float]:
  """Returns the last entropy, its fall by the first reprediction and its rise in the epoch behind that, in %.

  D2, which has no reprediction, is looked at in the same epochs.
  """
  steps = steps_per_epoch(config)['decipher']
  lines = {line['step'] // steps: line for line in looked_at(trained)}
  found = {'entropy': lines[config.decipher.epochs]['entropy']}
  if config.method.repredict:
    at = config.method.repredict[0]
    before, later = lines[at]['entropy'], lines[at + 1]['entropy']
    behind = lines[at].get('entropy_behind', before)
    found |= {'drop': 100 * (1 - behind / before), 'rise': 100 * (later / behind - 1)}
  return found


def say_oscillation(config: Settings) -> None:
  """Says so if a pseudo-label's step overshoots what it steps to."""
  own = config.method
  step = own.rate * own.alpha / config.decipher.batch_size
  if step > 2:
    say(
      f'WARNING: method.rate * alpha / batch size is {step:.3g}: steps of pseudo-labels above 2 oscillate; '
      'the paper takes 0.78.'
    )


def draw(
  config: Settings,
  rows: Mapping[str, Mapping[str, float]],
  curves: Mapping[str, Trained],
  path: Any,
) -> None:
  """Draws entropy of pseudo-labels and test accuracy over epochs; stars: behind training on hard labels."""
  steps = steps_per_epoch(config)['decipher']
  with pictures.drawn(path, 1, 2, size=(11, 4)) as (left, right):
    for name, own in curves.items():
      lines, points = looked_at(own), []
      for line in lines:
        epoch = line['step'] / steps
        points.append((epoch, line['entropy']))
        if 'entropy_behind' in line:
          points.append((epoch, line['entropy_behind']))
      left.plot(*zip(*points, strict=True), label=TITLES[name])
      points = [(line['step'] / steps, line['test']) for line in lines]
      (drawn,) = right.plot(*zip(*points, strict=True), label=TITLES[name])
      end = points[-1][0] * 1.02, rows[name]['accuracy']
      right.plot(*end, '*', color=drawn.get_color(), markersize=11)
    for name in ('supervised', 'longer'):
      if name in rows:
        style = {'color': 'gray', 'linestyle': ':' if name == 'longer' else '--'}
        right.axhline(rows[name]['accuracy'], label=TITLES[name], linewidth=1, **style)
    left.set_ylabel('mean entropy of pseudo-labels (nats)')
    right.set_ylabel('test accuracy (%)')
    for axis in (left, right):
      for mark in config.method.repredict:
        axis.axvline(mark, color='gray', linewidth=0.6, linestyle=':')
      axis.set_xlabel('epoch over the unlabeled images')
      axis.legend(frameon=False)
    left.set_title(pictures.title(config))


if __name__ == '__main__':
  launcher.main('r2d2')
