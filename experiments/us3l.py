"""US3L: Universally Slimmable Self-supervised Learning (Cao et al., CVPR 2023).

One set of weights is trained without labels so that its leading channels, a quarter of them or any larger
share, are a network of their own. In every step the whole network learns from a momentum teacher first, then
two narrower ones, through a head of their own, from what the same teacher said. The range of widths grows
over the training, and channels that few widths use decay less. Claim: targets that stay as they are within a
step keep narrow networks from collapsing, at less than three passes a step.

  python -m experiments.us3l
  python -m experiments.us3l --config=fashion_mnist --seeds=0,1,2
  python -m experiments.us3l --config=cifar100_resnet18 --workdir=DIR
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import costs, launcher, networks, pictures, results, runs
from experiments.harness import data as harness_data
from experiments.harness.runs import Run, say
from experiments.harness.settings import found_by, free, section
from experiments.protocols import feature_evaluation, pretraining, slimmable
from experiments.protocols.slimmable import Guidance, Networks, Step, Widths
from jaxlab import evaluation, models, training
from jaxlab.training import Program, TrainState, schedules

Array = jax.Array
PyTree = Any
COSTS = ('gigaflops', 'milliseconds', 'relative_flops', 'relative_time', 'megabytes')


@dataclasses.dataclass(frozen=True)
class Heads:
  """Channels of the projector (three layers) inside and at its end, and of the predictors inside."""

  hidden: int = 2048
  features: int = 2048
  predictor: int = 2048

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    for name, value in dataclasses.asdict(self).items():
      if value < 1:
        yield f'{name}={value}: expected at least 1 channel.'


@dataclasses.dataclass(frozen=True)
class GroupDecay:
  """Weight decay by groups of channels, in place of the optimizer's: see `training.group_regularizer`.

  Attributes:
    decay: of the first group.
    alpha: slope over the groups, from the middle of the training on: see `training.group_decays`.
    bins: groups.
    kind: how decay falls over the groups.
    warmup_epochs: in which all groups decay alike.
  """

  decay: float = 2.5e-4
  alpha: float = 0.05
  bins: int = 8
  kind: Literal['linear', 'exp'] = 'linear'
  warmup_epochs: int = 0

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.decay < 0:
      yield f'decay={self.decay}: expected at least 0.'
    if self.bins < 1:
      yield f'bins={self.bins}: expected at least 1 group.'
    elif self.kind == 'linear' and not 0 <= self.alpha * (self.bins - 1) <= 1:
      top = f'1 / (bins - 1) = {1 / (self.bins - 1):.3g}'
      yield f'alpha={self.alpha}: expected 0 to {top}; no decay is negative.'
    if self.kind == 'exp' and not 0 <= self.alpha <= 1:
      yield f'alpha={self.alpha}: expected a factor in [0, 1].'
    if self.warmup_epochs < 0:
      yield f'warmup_epochs={self.warmup_epochs}: expected at least 0.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(pretraining.Settings):
  """Settings of US3L.

  Attributes:
    widths: that are trained and judged.
    heads: over the backbone.
    momentum: share of the teacher that a step keeps.
    final_momentum: at the end of the training, half a cosine from `momentum`; None: constant.
    frozen: patterns of parameters that stay as drawn (MoCo v3's patch embedding).
    temperature: of InfoNCE.
    group_decay: None: the optimizer's weight decay alone.
    variants: what networks learn from, by the name of the run.
    runs: rows, of `variants`.
    timed: repeats of the measurement of a step's cost (see `relative_costs`); 0: none.
  """

  widths: Widths = section(Widths)
  heads: Heads = section(Heads)
  momentum: float = 0.99
  final_momentum: float | None = None
  frozen: tuple[str, ...] = ()
  temperature: float = 0.5
  group_decay: GroupDecay | None = None
  variants: Mapping[str, Guidance]
  runs: tuple[str, ...]
  timed: int = free(0)


def make_networks(config: Settings, own: Guidance) -> Networks:
  """Returns the modules of a variant."""
  sizes = (config.heads.hidden, config.heads.hidden, config.heads.features)
  hidden_bias = (True, not own.predictor)  # without a predictor all layers have a bias
  projector = models.MLPHead(sizes, hidden_bias=hidden_bias)
  head = functools.partial(models.simsiam_predictor, config.heads.predictor, config.heads.features)
  encoder = models.Encoder(networks.create(config.model, num_classes=None), projector)
  return Networks(encoder, head() if own.predictor else None, head() if own.own_head else None)


def training_of(config: Settings, name: str, fixed: Sequence[float] | None = None) -> Run:
  """Returns the pretraining of a variant.

  Args:
    config: the settings.
    name: of the variant.
    fixed: narrow widths that every step trains, in place of those that it draws.
  """
  own, recipe = config.variants[name], config.recipe
  nets, length = make_networks(config, own), pretraining.length(config)
  rate = recipe.schedule.make(recipe.epochs, length.steps_per_epoch)
  views = pretraining.two_views(config)
  optimizer = recipe.optimizer.make(1.0, config.frozen)
  parts = {field: module for field, module in nets._asdict().items() if module is not None}
  dtype = recipe.program_options['compute_dtype'] or 'float32'

  def init(key: Array) -> TrainState:
    keys = dict(zip((*parts, 'views', 'widths'), jax.random.split(key, len(parts) + 2)))
    blank, z = jnp.zeros((2, *config.data.view)), jnp.zeros((2, config.heads.features))
    params = {
      field: module.init(keys[field], blank if field == 'encoder' else z, train=True)['params']
      for field, module in parts.items()
    }
    extra = {'teacher': params['encoder']} if own.teacher == 'momentum' else {}
    drawn = {field: jax.random.key_data(keys[field]) for field in ('views', 'widths')}
    return TrainState(jnp.int32(0), params, optimizer.init(params), {}, extra, drawn)

  def step(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
    del frozen
    keys, epoch = training.step_keys(state), state.step // length.steps_per_epoch
    each = jax.vmap(lambda index: jax.random.fold_in(keys['views'], index))(batch['index'])
    seen = training.cast_floating(views(each, batch['image']), dtype)
    if fixed is None:
      ranges = recipe.epochs, config.widths, own.growing
      drawn = slimmable.draw_widths(keys['widths'], epoch, *ranges)
      narrow = epoch >= recipe.epochs // 4 if own.growing else jnp.bool_(True)
    else:
      drawn, narrow = jnp.arange(len(fixed)), jnp.bool_(len(fixed) > 0)

    def penalty(params: PyTree, skip: Sequence[str]) -> Array:
      if (group := config.group_decay) is None:
        return jnp.float32(0)
      slope = training.group_slope(epoch, group.alpha, group.warmup_epochs, recipe.epochs // 2)
      decays = training.group_decays(group.decay, slope, group.bins, group.kind)
      return training.group_regularizer(params, decays, skip=skip)

    share = config.momentum
    if config.final_momentum is not None:
      share = schedules.cosine(share, length.num_steps, config.final_momentum)(state.step)
    widths = config.widths.drawn if fixed is None else fixed
    plan = Step(nets, own, widths, optimizer, share, config.temperature, penalty)
    teacher, current = state.extra.get('teacher'), rate(state.step)
    found = slimmable.iterate(
      plan, state.params, state.opt_state, teacher, seen, current, drawn, narrow
    )
    metrics = {
      'loss': found.losses[0],
      'loss_narrow': jnp.where(narrow, jnp.mean(found.losses[1:]), jnp.nan),
      'z_std': evaluation.feature_std(found.projections[0]),
      'passes': 1 + 2 * narrow.astype(jnp.float32),
      'learning_rate': current,
    }
    extra = {'teacher': found.teacher} if own.teacher == 'momentum' else {}
    new = state.replace(
      step=state.step + 1, params=found.params, opt_state=found.opt_state, extra=extra
    )
    return new, metrics

  batch = config.task.batch(recipe.batch_size)
  shapes = {field: batch[field] for field in ('image', 'index')}
  program = Program(init, step, shapes, recipe.program_options['rules'])
  read = ('widths', 'heads', 'momentum', 'final_momentum', 'frozen', 'temperature', 'group_decay')
  decides = {field: getattr(config, field) for field in ('model', 'augment', *read)}
  decides |= {'guidance': dataclasses.replace(own, title='')}
  return Run(config, config.data, recipe, program, length.num_steps, decides, own.title)


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from pretraining.check(config)
  yield from feature_evaluation.check(config.eval, config.data.train_size)
  if unknown := [name for name in config.runs if name not in config.variants] or not config.runs:
    yield f'runs={config.runs}: expected names of variants: {", ".join(config.variants)}; got {unknown}.'
  titles = [own.title for own in config.variants.values()]
  yield from results.check_claims(config, ['untrained', *titles], metric_names(config))
  if config.recipe.microbatches > 1:
    yield 'recipe.microbatches: expected 1; a step is several updates of one batch.'
  if config.recipe.epochs < 4:
    yield f'recipe.epochs={config.recipe.epochs}: expected at least 4, the range of widths grows by quarters.'
  if config.recipe.batch_size < 2:
    yield 'recipe.batch_size: expected at least 2, for batch norms and negatives.'
  if not 0 <= config.momentum <= 1 or config.temperature <= 0:
    own = f'momentum={config.momentum}, temperature={config.temperature}'
    yield f'{own}: expected a share and a positive number.'
  if config.final_momentum is not None and not 0 <= config.final_momentum <= 1:
    yield f'final_momentum={config.final_momentum}: expected a share in [0, 1], or None.'
  if config.timed < 0:
    yield f'timed={config.timed}: expected a number of repeats, or 0 for none.'
  if config.group_decay and config.recipe.optimizer.weight_decay:
    yield 'group_decay: it takes the place of recipe.optimizer.weight_decay; set that to 0.'
  backbone = networks.create(config.model, num_classes=None)
  if not list(config.widths.check()):
    for width in {*config.widths.drawn, *config.widths.judged}:
      yield from found_by('widths', models.narrow, backbone, width)


def metric_names(config: Settings) -> list[str]:
  """Returns the names of what is measured of a row.

  `compiled_widths` is the number of widths that the one compiled step holds.
  """
  kinds = [kind.removesuffix('_fp') for kind in config.eval.metrics()]
  names = [f'{kind}_{width:g}' for kind in kinds for width in config.widths.judged]
  names += [f'foreign_knn_{width:g}' for width in config.widths.judged]
  names += [*(f'{kind}_drop' for kind in kinds), 'knn_calibration', 'z_std', 'passes']
  return [*names, 'compiled_widths', *(COSTS if config.timed else ())]


def compared(config: Settings, metrics: Mapping[str, float]) -> dict[str, float]:
  """Returns the metrics, with what the narrowest network lacks (`*_drop`) and its own statistics bring."""
  narrow, whole = min(config.widths.judged), max(config.widths.judged)
  kinds = [kind.removesuffix('_fp') for kind in config.eval.metrics()]
  drops = {
    f'{kind}_drop': metrics[f'{kind}_{whole:g}'] - metrics[f'{kind}_{narrow:g}'] for kind in kinds
  }
  gain = metrics[f'knn_{narrow:g}'] - metrics[f'foreign_knn_{narrow:g}']
  return {**metrics, **drops, 'knn_calibration': gain}


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings by the names of `config.runs`."""
  del facts
  return {name: training_of(config, name) for name in config.runs}


def relative_costs(config: Settings) -> dict[str, dict[str, float]]:
  """Returns what a step costs by name of `config.runs`, the mean over the training; nothing if `timed` is 0.

  XLA counts of the branches of a program the largest, once, whichever are run. So steps with fixed widths are
  compiled, of the whole network alone and with one narrow network of each width, and what that adds is
  weighted by how often it is drawn (`slimmable.narrow_passes`).

  Returns:
    `gigaflops` on one device and `milliseconds`; `relative_flops` and `relative_time`, these over the same
    with all widths from the start; `megabytes` on one device of the step that is trained, which holds all
    branches however widths are drawn. See `costs.measure`.
  """
  if not config.timed:
    return {}
  say('costs of a step')
  fixed = [(), *((width,) for width in config.widths.drawn)]
  # Variants that differ in the range of widths alone have the same steps.
  alike = {
    name: dataclasses.replace(config.variants[name], title='', growing=True) for name in config.runs
  }
  sides = {
    f'{own} {widths}': costs.Side(training_of(config, name, widths).program)
    for name, own in alike.items()
    for widths in (None, *fixed)
  }
  steps = costs.measure(sides, config.mesh.make(), config.timed)

  def mean(name: str, kind: str, growing: bool) -> float:
    alone, *added = (steps[f'{alike[name]} {widths}'][kind] for widths in fixed)
    passes = slimmable.narrow_passes(config.recipe.epochs, config.widths, growing)
    return alone + float(passes @ (np.asarray(added) - alone))

  found = {}
  for name, own in alike.items():
    found[name] = {'megabytes': steps[f'{own} None']['megabytes']}
    for kind, ratio in (('gigaflops', 'relative_flops'), ('milliseconds', 'relative_time')):
      found[name][kind] = mean(name, kind, config.variants[name].growing)
      found[name][ratio] = found[name][kind] / mean(name, kind, False)
  return found


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Pretrains every variant, and judges its backbone at several widths, each with statistics of its own."""
  sources = {split: harness_data.load(config.data, split) for split in ('train', 'test')}
  judge = slimmable.evaluator(config, config.widths, sources)
  plan, rows, histories, costly = programs(config), [], {}, relative_costs(config)
  drawn = jax.jit(plan[config.runs[0]].program.init)(jax.random.key(config.seed))
  untrained = compared(config, judge('untrained', drawn.params))
  rows.append(results.row('untrained', 'baseline', untrained))
  for name, own in plan.items():
    trained = runs.train(own, sources['train'], workdir / name)
    z_std = pretraining.say_collapse(own.title, trained.history)
    histories[own.title] = trained.history
    passes = float(np.mean([line['passes'] for line in trained.history if 'passes' in line]))
    metrics = compared(config, judge(own.title, trained.variables['params']))
    metrics |= {'z_std': z_std, 'passes': passes, **costly.get(name, {})}
    metrics['compiled_widths'] = len({1.0, *config.widths.drawn})
    role = 'method' if config.variants[name].teacher == 'momentum' else 'baseline'
    rows.append(results.row(own.title, role, metrics))
  draw(config, rows, workdir / 'accuracy_over_width.png')
  pretraining.draw_curves(config, histories, workdir / 'curves.png')
  return results.results(config, rows, metric_names(config), 'accuracies in %')


def draw(config: Settings, rows: Sequence[Mapping[str, Any]], picture: pathlib.Path) -> None:
  """Draws the neighbors' accuracy over width, with a width's own and with foreign batch statistics."""
  with pictures.drawn(picture, size=(7, 4.2)) as axis:
    for index, item in enumerate(rows):
      for kind, style in (('knn', '-'), ('foreign_knn', ':')):
        values = [item['metrics'][f'{kind}_{width:g}'] for width in config.widths.judged]
        label = item['name'] if kind == 'knn' else f'{item["name"]}, statistics of the largest'
        axis.plot(config.widths.judged, values, style, color=f'C{index}', marker='o', label=label)
    axis.set_xlabel('width')
    axis.set_ylabel('accuracy of nearest neighbors (%)')
    axis.set_title(pictures.title(config))
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)


if __name__ == '__main__':
  launcher.main('us3l')
