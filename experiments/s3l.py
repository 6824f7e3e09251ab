"""S3L, Rethinking Self-Supervised Learning: Small is Beautiful (Cao & Wu 2021).

Not a loss but a pipeline: a network is pretrained at small resolution, perhaps in stages of growing images;
without its last stage, which is attached and warmed up later; on few images. Then all of it is fine-tuned
with labels. Claim: as accurate as pretraining the whole network at full resolution, or more, at a fraction of
the cost.

  python -m experiments.s3l
  python -m experiments.s3l --config=fashion_mnist --seeds=0,1,2
  python -m experiments.s3l --config=cub_moco_resnet50 --workdir=DIR
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from experiments.harness import costs, launcher, networks, pictures, results, runs
from experiments.harness import data as harness_data
from experiments.harness.data import Images
from experiments.harness.runs import Run, Trained, Variables
from experiments.harness.sections import check_batch
from experiments.harness.settings import found_by, free, section
from experiments.protocols import (
  fine_tuning,
  pretraining,
  resolution_stages,
  siamese,
  siamese_methods,
)
from experiments.protocols.fine_tuning import FineTuning
from experiments.protocols.resolution_stages import Stage
from experiments.protocols.siamese_methods import Heads, Momentum
from experiments.protocols.subsets import Subset
from jaxlab import data, losses, models
from jaxlab.parallel import deinterleave, interleave
from jaxlab.training import TrainState

UNTRAINED = 'untrained'
METRICS = ('fine_tuned', 'flops', 'time', 'z_std')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
  """A way to pretrain, a row.

  Attributes:
    name: of the row.
    stages: one after another, each from the whole state of the one before.
    last_stage: of the network: 'pretrained' with the rest; 'attached' to a pretraining without it, and warmed
      up; or 'redrawn', pretrained and then drawn anew.
    role: in the comparison.
  """

  name: str
  stages: tuple[Stage, ...]
  last_stage: Literal['pretrained', 'attached', 'redrawn'] = 'pretrained'
  role: Literal['baseline', 'method', 'reference'] = 'method'

  @property
  def folder(self) -> str:
    """The name as folders have it."""
    return ''.join(letter if letter.isalnum() else '_' for letter in self.name)

  @property
  def stage_names(self) -> list[str]:
    """Names of the stages with all before them; variants that begin alike share these runs."""
    first = ['cut'] * (self.last_stage == 'attached')
    names = [stage.name for stage in self.stages]
    return ['_'.join([*first, *names[: index + 1]]) for index in range(len(names))]

  @property
  def before(self) -> list[tuple[str, str]]:
    """Names of all runs in front of the fine-tuning, each with what a step of its kind is called."""
    cut = self.last_stage == 'attached'
    kinds = [f'{"cut " * cut}{stage.size}' for stage in self.stages]
    found = list(zip(self.stage_names, kinds, strict=True))
    return [*found, *[(f'{self.folder}_warm_up', 'warm-up')] * cut]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(pretraining.Settings):
  """Settings of S3L.

  Attributes:
    ssl: the method of the pretraining.
    heads: over the backbone; `hidden` 0 is as many channels as its features have.
    target: momentum encoder, queue, temperature.
    base_temperature: of SimCLR, whose loss is multiplied by temperature / base_temperature as in the authors'
      code, which scales the learning rate; equal to the temperature it is the usual NT-Xent.
    unlabeled: the images of `data` that are pretrained on.
    variants: rows; costs are relative to the first.
    labels: data of the fine-tuning; None: the images of the pretraining.
    labeled: the part of these that is fine-tuned on.
    warm_up: of an attached stage, which alone learns then, with the head; None: no variant has one.
    fine_tuning: of everything.
    timed: times that steps are measured; 0: operations are counted alone.
  """

  ssl: Literal['moco', 'simclr', 'byol'] = 'moco'
  heads: Heads = section(Heads)
  target: Momentum = section(Momentum)
  base_temperature: float = 0.07
  unlabeled: Subset = section(Subset)
  variants: tuple[Variant, ...]
  labels: Images | None = None
  labeled: Subset = section(Subset)
  warm_up: FineTuning | None = None
  fine_tuning: FineTuning
  timed: int = free(3)


def small_data(config: Settings) -> Settings:
  """Returns the settings with `data` as large as the part that is pretrained on."""
  return dataclasses.replace(config, data=config.unlabeled.of(config.data))


def labeled_data(config: Settings) -> Settings:
  """Returns the settings with the data of the fine-tuning in place of `data`."""
  own = small_data(config).data if config.labels is None else config.labels
  return dataclasses.replace(config, data=config.labeled.of(own))


def method(config: Settings, stage: Stage) -> tuple[siamese.Networks, siamese.Targets]:
  """Returns the networks of `config.ssl`, and what their predictions are compared with.

  SimCLR has the head of MoCo v2 (no batch norm) and the loss of SupCon's code; both views go through the
  encoder as one batch, whose statistics they share.
  """
  network = networks.create(config.model, num_classes=None)
  models.require_resolution(network, stage.size)
  hidden = config.heads.hidden or models.feature_width(network)
  heads = dataclasses.replace(config.heads, hidden=hidden)
  if config.ssl != 'simclr':
    own = config.model, heads, config.target, stage.length(config)
    return siamese_methods.method(config.ssl, *own)

  def loss(projections: list[jax.Array], _: list[jax.Array]) -> jax.Array:
    temperatures = config.target.temperature, config.base_temperature
    return losses.multi_view_contrastive_loss(list(deinterleave(projections[0], 2)), *temperatures)

  targets = siamese_methods.own_projections(loss)
  joined = lambda encoder, extra, views, *rest: targets.see(  # noqa: E731
    encoder, extra, [interleave(views)], *rest
  )
  encoder = models.Encoder(network, models.moco_projector(hidden, heads.features))
  return siamese.Networks(encoder, None), targets._replace(see=joined)


def stage_training(config: Settings, variant: Variant, stage: Stage, start: Any) -> Run:
  """Returns a stage of a pretraining that starts where the run with identity `start` ends."""
  config = small_data(config)
  if variant.last_stage == 'attached':
    cut = models.truncate(networks.create(config.model))
    fields = {'stage_sizes': cut.stage_sizes, 'widths': cut.widths}
    config = dataclasses.replace(config, model={**config.model, **fields})
  names = ('ssl', 'heads', 'target', 'base_temperature', 'unlabeled')
  decides = {'start': start, **{name: getattr(config, name) for name in names}}
  return resolution_stages.training(config, stage, *method(config, stage), decides)


def last_parts(config: Settings) -> tuple[str, str]:
  """Returns patterns of the last stage and of the head, in a fine-tuned network."""
  return 'backbone/' + models.last_stage(networks.create(config.model)), 'head/.*'


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the stages of all pretrainings, and warm-up and fine-tuning of each variant, by name."""
  del facts
  labeled, found, last = labeled_data(config), {}, []
  images = {'unlabeled': config.unlabeled, 'labeled': config.labeled}
  rest = f'(?!{"|".join(last_parts(config))}).*'
  # Programs of all variants are the same; they differ in what they start from.
  if config.warm_up:
    warm_up = fine_tuning.training(labeled, config.warm_up, '', None, (rest,))
  tune = fine_tuning.training(labeled, config.fine_tuning, UNTRAINED, images)

  def starting(run: Run, title: str, start: Any) -> Run:
    return run._replace(title=title, decides={**run.decides, 'start': start})

  for own in config.variants:
    start = None
    for stage, name in zip(own.stages, own.stage_names, strict=True):
      if name not in found:
        found[name] = stage_training(config, own, stage, start)
      start = found[name].identity
    start = {'pretraining': start, 'last_stage': own.last_stage, **images}
    if own.last_stage == 'attached':
      run = starting(warm_up, f'{own.name}: last stage and head', start)
      last.append((f'{own.folder}_warm_up', run))
      start = run.identity
    last.append((f'{own.folder}_fine_tuned', starting(tune, own.name, start)))
  return {**found, **dict(last), f'{UNTRAINED}_fine_tuned': tune}


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  rows = [own.name for own in config.variants]
  yield from results.check_claims(config, [UNTRAINED, *rows], METRICS)
  if None in {own.train_size for own in (config.data, config.labels or config.data)}:
    yield 'data.train_size, labels.train_size: missing; schedules are made for it.'
    return
  own, recipe = config.target, config.recipe
  yield from siamese_methods.check((config.ssl,), recipe, own)
  if recipe.batch_size < 2:
    yield f'recipe.batch_size={recipe.batch_size}: expected at least 2, for batch norms and negatives.'
  if recipe.microbatches > 1:
    yield 'recipe.microbatches: expected 1; negatives, statistics and queue are of the whole batch.'
  if config.base_temperature <= 0 or config.timed < 0:
    yield f'base_temperature={config.base_temperature}, timed={config.timed}: expected > 0 and >= 0.'
  folders = [UNTRAINED, *(own.folder for own in config.variants)]
  if not rows or len({*folders}) < len(folders):
    yield f'variants: {rows}: expected rows whose names differ in letters or digits, and from {UNTRAINED!r}.'
  problems = [
    *found_by('unlabeled', small_data, config),
    *found_by('labeled', labeled_data, config),
  ]
  yield from problems
  if problems:
    return
  yield from pretraining.check(small_data(config))
  for own in config.variants:
    if not own.stages:
      yield f'variants: {own.name!r} has no stages.'
    if own.last_stage == 'attached' and config.warm_up is None:
      yield f'warm_up: missing; it trains the attached stage of {own.name!r}.'
    for stage in own.stages:
      problems = list(stage.check())
      problems = problems or found_by('', stage_training, config, own, stage, None)
      yield from (f'variants: {own.name!r}: {problem.removeprefix(": ")}' for problem in problems)
  labeled = labeled_data(config)
  size = min(labeled.data.view[:2])
  problems = [
    *found_by('model', lambda: models.require_resolution(networks.create(config.model), size))
  ]
  yield from problems
  for key in () if problems else ('warm_up', 'fine_tuning'):
    if training := getattr(config, key):
      name = f'{key}.recipe.batch_size'
      yield from check_batch(config.mesh, training.recipe.batch_size, name)
      yield from fine_tuning.check(labeled, training, key)


def load(config: Settings) -> tuple[data.Source, dict[str, data.Source]]:
  """Returns the images of the pretraining, and the splits of the fine-tuning."""
  rng, own = np.random.default_rng(config.seed), config.labels or config.data
  unlabeled = config.unlabeled.draw(rng, harness_data.load(config.data, 'train'))
  train = unlabeled if config.labels is None else harness_data.load(own, 'train')
  test = harness_data.load(own, 'test')
  return unlabeled, {'train': config.labeled.draw(rng, train), 'test': test}


def attached(
  variables: Variables | None, fresh: Sequence[str]
) -> Callable[[TrainState], TrainState] | None:
  """Returns `drawn state -> state` with pretrained variables in place of all but `fresh` ones; None: none."""
  if variables is None:
    return None

  def begin(drawn: TrainState) -> TrainState:
    new = models.attach_stage(variables, runs.variables_of(drawn), fresh)
    return drawn.replace(params=new.pop('params'), model_state=new)

  return begin


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Pretrains every variant, warms up what was left out, fine-tunes all, and compares accuracy and cost."""
  unlabeled, sources = load(config)
  plan, labeled, stage_and_head = programs(config), labeled_data(config), last_parts(config)
  done: dict[str, Trained] = {}
  sides = {
    kind: costs.Side(plan[name].program) for own in config.variants for name, kind in own.before
  }
  steps = costs.measure(sides, config.mesh.make(), config.timed)

  def pretrain(own: Variant) -> Trained:
    before = None
    for index, name in enumerate(own.stage_names):
      if name not in done:
        begin = None
        if before is not None:
          begin = functools.partial(resolution_stages.carry, before.state)
        key = jax.random.fold_in(jax.random.key(config.seed), index)
        done[name] = runs.train(plan[name], unlabeled, workdir / name, begin=begin, key=key)
      before = done[name]
    return before

  def tuned(name: str, start: Variables | None, fresh: Sequence[str]) -> Trained:
    return runs.train(plan[name], sources['train'], workdir / name, begin=attached(start, fresh))

  def accuracy(folder: str, start: Variables | None, fresh: Sequence[str]) -> float:
    found = tuned(f'{folder}_fine_tuned', start, fresh).variables
    return fine_tuning.judged(labeled, config.fine_tuning, found, sources['test'])

  def cost(own: Variant, kind: str) -> float:
    return sum(plan[name].num_steps * steps[step][kind] for name, step in own.before)

  rows = [results.row(UNTRAINED, 'baseline', {'fine_tuned': accuracy(UNTRAINED, None, ())})]
  for own in config.variants:
    last = pretrain(own)
    backbone = siamese.backbone_variables(last.variables)
    start, fresh = {kind: {'backbone': tree} for kind, tree in backbone.items()}, stage_and_head
    if own.last_stage == 'pretrained':
      fresh = stage_and_head[1:]
    elif own.last_stage == 'attached':
      start, fresh = tuned(f'{own.folder}_warm_up', start, fresh).variables, ()
    metrics = {'fine_tuned': accuracy(own.folder, start, fresh)}
    for metric, kind in (('flops', 'gigaflops'), *[('time', 'milliseconds')] * bool(config.timed)):
      metrics[metric] = cost(own, kind) / cost(config.variants[0], kind)
    metrics['z_std'] = pretraining.say_collapse(own.name, last.history)
    rows.append(results.row(own.name, own.role, metrics))
  draw(config, rows, workdir / 'accuracy_over_cost.png')
  histories = {plan[name].title: own.history for name, own in done.items()}
  pretraining.draw_curves(config, histories, workdir / 'curves.png')
  title = "accuracy in %; operations and time of the pretraining over the first row's"
  return results.results(config, rows, METRICS, title)


def draw(config: Settings, rows: Sequence[Mapping[str, Any]], picture: pathlib.Path) -> None:
  """Draws accuracy over the operations of the pretraining."""
  with pictures.drawn(picture, size=(7, 4.2)) as axis:
    for item in rows:
      place = item['metrics'].get('flops', 0.0), item['metrics']['fine_tuned']
      (point,) = axis.plot(*place, 'o' if item['role'] == 'method' else 's')
      label = {'xytext': (6, 4), 'textcoords': 'offset points', 'color': point.get_color()}
      axis.annotate(item['name'], place, **label)
    axis.margins(x=0.25, y=0.15)
    axis.set_xlabel('operations of the pretraining, relative')
    axis.set_ylabel('accuracy after fine-tuning (%)')
    axis.set_title(pictures.title(config))
    axis.grid(alpha=0.3)


if __name__ == '__main__':
  launcher.main('s3l')
