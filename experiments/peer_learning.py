"""Peer-learning: Webly Supervised Fine-Grained Recognition (Sun et al., ICCV 2021).

Sun, Yao, Wei, Zhang, Shen, Wu, Zhang & Shen, arXiv 2108.02399. Labels of images that a search by their class
name brings are wrong by a third and more. Two networks, drawn differently, learn side by side; a batch is
split by what they predict:

  - where they disagree, both learn from all examples, right or wrong: they stay different;
  - where they agree, each learns from the small-loss examples that its peer chooses, a share that shrinks
    over the first epochs: what one takes for noise the other does not see.

Claim: without clean labels or a model of the noise, accuracy stays where plain training memorizes wrong
labels and falls; Decoupling (the first part alone) and Co-teaching (the second, of all examples) are its
parents.

  python -m experiments.peer_learning
  python -m experiments.peer_learning --config=fashion_mnist --seeds=0,1,2
  python -m experiments.peer_learning --config=web_aircraft --workdir=DIR

Bilinear networks are trained in two steps: first their classifiers on frozen features, then, from each
network's best epoch by the test images (as the official code does), all layers.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from experiments.harness import costs, launcher, results
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Recipe
from experiments.harness.settings import found_by, free
from experiments.protocols import network_pairs, noisy_labels
from experiments.protocols.noisy_labels import Sources
from jaxlab import losses
from jaxlab.training import schedules

Array = jax.Array

# What both networks learn from, as a function of `(logits1, logits2, labels, drop rate)`.
LOSSES: dict[str, Callable[..., losses.PairLoss]] = {
  'ce': lambda *given: losses.co_teaching_loss(*given[:3], 0.0),
  'decoupling': losses.decoupling_loss,
  'co_teaching': losses.co_teaching_loss,
  'small_loss': lambda *given: losses.co_teaching_loss(*given, exchange=False),
  'agreement': lambda *given: losses.peer_learning_loss(*given, 'agreement'),
  'peer': losses.peer_learning_loss,
}
TITLES = {
  'ce': 'CE', 'decoupling': 'Decoupling', 'co_teaching': 'Co-teaching', 'small_loss': 'Small loss',
  'agreement': 'Agreement alone', 'peer': 'Peer-learning',
}  # fmt: skip
# The row that stands for what no network has chosen.
ALL = 'All examples'


@dataclasses.dataclass(frozen=True)
class Peer:
  """What is chosen, and how Adam changes.

  Attributes:
    drop_rate: share of the examples that networks agree on that is left out behind the ramp, xi.
    ramp_epochs: epochs in which it rises from 0, T_k.
    late_beta1: beta1 of Adam from epoch `late_epoch` on; None: as in `recipe.optimizer`.
    late_epoch: see there.
  """

  drop_rate: float
  ramp_epochs: int = 10
  late_beta1: float | None = None
  late_epoch: int = 40

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from found_by('drop_rate', schedules.drop_rate_ramp, self.drop_rate, self.ramp_epochs)
    if self.late_beta1 is not None and not 0 <= self.late_beta1 < 1:
      yield f'late_beta1={self.late_beta1}: expected a number in [0, 1), or None.'
    if self.late_epoch < 0:
      yield f'late_epoch={self.late_epoch}: expected an epoch.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(noisy_labels.Settings):
  """Settings of Peer-learning.

  Attributes:
    peer: the method.
    classifier: the recipe of a first step, of the classifiers alone; None: there is none.
    runs: rows: 'ce' (both networks on all examples), 'decoupling', 'co_teaching', 'small_loss' (Co-teaching
      with each network's own choice), 'peer', and 'agreement' (without the examples that are disagreed on).
    compared: whether a step's operations are counted next to those of one network alone.
  """

  peer: Peer
  classifier: Recipe | None = None
  runs: tuple[str, ...] = ('ce', 'decoupling', 'co_teaching', 'small_loss', 'peer')
  compared: bool = free(True)


def training(config: Settings, name: str, step: str = 'whole') -> Run:
  """Returns the training of a row, or its first step, 'classifier'."""
  own = config.peer
  recipe = config.recipe if step == 'whole' else config.classifier
  steps = noisy_labels.steps_per_epoch(config, recipe)
  num_steps = recipe.epochs * steps
  ramp = schedules.drop_rate_ramp(own.drop_rate, own.ramp_epochs, recipe.epochs)
  drop_rate = schedules.per_epoch(ramp, steps)

  def loss(logits1: Array, logits2: Array, labels: Array, step: Array) -> losses.PairLoss:
    return LOSSES[name](logits1, logits2, labels, drop_rate(step))

  options: dict[str, Any] = {}
  if own.late_beta1 is not None:
    early, beta2 = recipe.optimizer.betas or (0.9, 0.999)
    beta1 = schedules.per_epoch(schedules.switched(early, own.late_beta1, own.late_epoch), steps)
    options = {'options': {'betas': (beta1, beta2)}}
  title, revise_at = TITLES[name], ()
  decides = {**noisy_labels.decided(config), 'peer': own, 'loss': name}
  if step == 'classifier':
    keeps = network_pairs.classifier(config)
    options |= {'frozen': (noisy_labels.features(config),), 'best': keeps}
    title, revise_at = f'{title}, classifiers', range(steps, num_steps, steps)
  elif config.classifier is not None:
    decides['start'] = training(config, name, 'classifier').identity
  program = network_pairs.program(config, recipe, loss, **options)
  return Run(config, config.data, recipe, program, num_steps, decides, title, revise_at=revise_at)


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from noisy_labels.check(config)
  if config.data.multi_label:
    yield 'data.multi_label: expected one label an image.'
  rows = [*TITLES.values(), ALL]
  yield from results.check_claims(config, rows, [*network_pairs.METRICS, 'operations'])
  if unknown := [name for name in config.runs if name not in LOSSES]:
    yield f'runs: {unknown} are none of {", ".join(LOSSES)}.'
  if not config.runs:
    yield f'runs is empty; runs: {", ".join(LOSSES)}.'
  recipes = {'recipe': config.recipe, 'classifier': config.classifier}
  for key, recipe in recipes.items():
    if recipe is None:
      continue
    if key != 'recipe':
      yield from noisy_labels.check_recipe(config, recipe, key)
    if recipe.epochs < config.peer.ramp_epochs:
      yield f'peer.ramp_epochs={config.peer.ramp_epochs} exceeds {key}.epochs={recipe.epochs}.'
    if recipe.mixup or recipe.cutmix:
      yield f'{key}: expected neither mixup nor cutmix; an example has one loss to be ranked by.'
    if recipe.microbatches > 1:
      yield f'{key}.microbatches: expected 1; examples are chosen among the whole batch.'
    if recipe.best_metric:
      yield f'{key}.best_metric: the networks are best at different epochs; expected none.'
    if not recipe.eval_every:
      yield f'{key}.eval_every: expected a number of steps; both networks are judged as they learn.'
    if config.peer.late_beta1 is not None and recipe.optimizer.name != 'adam':
      yield f'peer.late_beta1 is of adam, not of {key}.optimizer.name={recipe.optimizer.name!r}.'


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings by the names of `config.runs`, first steps as `<name>_classifier`."""
  del facts
  plan = {}
  for name in config.runs:
    if config.classifier is not None:
      plan[f'{name}_classifier'] = training(config, name, 'classifier')
    plan[name] = training(config, name)
  return plan


def first_step(
  config: Settings, plan: Mapping[str, Run], name: str, sources: Sources, folder: pathlib.Path
) -> dict[str, Any]:
  """Returns what a row's training starts from: public weights, under classifiers that were trained first."""
  given: dict[str, Any] = {}
  if config.pretrained:
    public: Variables = noisy_labels.public(config)
    given['start'] = network_pairs.joined(network_pairs.of_both([public, public]))
    given['fresh'] = [f'{path}/.*' for path in noisy_labels.head(config)]
  if config.classifier is None:
    return given
  given['keeps'] = network_pairs.classifier(config)
  run = plan[f'{name}_classifier']
  trained = network_pairs.train(config, run, sources, folder / f'{name}_classifier', **given)
  return {'start': network_pairs.best_of(trained)}


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains each row's two networks."""
  sources, plan = noisy_labels.load(config), programs(config)
  steps = noisy_labels.steps_per_epoch(config)
  histories, lines = {}, []
  for name in config.runs:
    start = first_step(config, plan, name, sources, workdir)
    trained = network_pairs.train(config, plan[name], sources, workdir / name, **start)
    metrics = network_pairs.scores(trained.history, steps)
    if name == 'peer' and config.compared:
      metrics |= compared(config, plan[name])
    histories[TITLES[name]] = [
      {**line, 'kept_right': network_pairs.precision([line])} if line.get('kept') else line
      for line in trained.history
    ]
    role = 'method' if name == 'peer' else 'reference' if name == 'agreement' else 'baseline'
    lines.append(results.row(TITLES[name], role, metrics))
  if facts := sources.facts:
    lines.append(results.row(ALL, 'reference', {'kept_correct': facts['label_accuracy']}))
  panels = (
    ('test', 'test accuracy, mean of two networks (%)', 1),
    ('kept_right', 'right labels among kept examples (%)', 100),
    ('disagreement', 'examples that networks disagree on (%)', 100),
  )
  noisy_labels.draw_curves(config, histories, workdir / 'accuracy_over_epochs.png', panels=panels)
  return results.results(config, lines, title='accuracies and shares in %')


def compared(config: Settings, pair: Run) -> dict[str, float]:
  """Returns `operations`: those of a step of two networks over those of one alone on the same batch."""
  alone = noisy_labels.training_run(config, 'one network')
  sides = {'one': costs.Side(alone.program), 'two': costs.Side(pair.program)}
  found = costs.measure(sides, config.mesh.make(), repeats=0)
  return {'operations': found['two']['gigaflops'] / found['one']['gigaflops']}


if __name__ == '__main__':
  launcher.main('peer_learning')
