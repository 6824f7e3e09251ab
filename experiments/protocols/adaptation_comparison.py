"""Ways to adapt a frozen network, compared: accuracy on every task, what is trained, what is kept."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import data as harness_data
from experiments.harness import networks, pictures, results, runs
from experiments.harness.data import Images
from experiments.harness.runs import Run, Variables, say
from experiments.harness.settings import found_by, identity, problems
from experiments.harness.tasks import ImageTask, is_correct
from experiments.protocols import adaptation
from experiments.protocols.adaptation import SWEPT, Adaptation, Row, Settings, Target
from experiments.protocols.adaptation_tuning import Tuning
from experiments.protocols.hold_out import held_out_rows
from experiments.protocols.replicas import diverged, sweep
from jaxlab import adapters, data, models, parallel
from jaxlab.parallel import aot
from jaxlab.training import map_batches, step_keys

Array = jax.Array
PyTree = Any

UNITS = 'accuracy in %; numbers that are trained; megabytes of a step'
COSTS = ('trained', 'trained_with_head', 'residual_mb', 'temporary_mb')


class Plan(NamedTuple):
  """What a row does on a task.

  Attributes:
    own: how it is trained there.
    adaptation: the functions.
    search: the training that learning rates and weight decays are chosen by; None: there is one of each.
    training: the training.
  """

  own: Tuning
  adaptation: Adaptation
  search: Run | None
  training: Run


class Sources(NamedTuple):
  """Records of a task; `validation` may be None."""

  train: data.Source
  test: data.Source
  validation: data.Source | None


def source_training(config: Settings) -> Run | None:
  """Returns the training of the network on its source task; None: it has public weights."""
  return networks.training(config, config.network, 'source task') if config.network.recipe else None


def plans(config: Settings, table: Mapping[str, Row]) -> dict[tuple[str, str], Plan]:
  """Returns what every row does on every task; tasks of one shape share the functions of a row."""
  shared, found = {}, {}

  def made(name: str, target: Target, own: Tuning, size: int) -> Adaptation:
    shape = ImageTask.of(target.data), target.augment, target.data.num_classes, size
    key = repr((name, own.model, own.options, shape))
    if key not in shared:
      shared[key] = adaptation.adapted(config, table[name], own, target, size)
    return shared[key]

  for name in config.runs:
    for task in config.tasks:
      target, own = config.target[task], config.tuned(name, task)
      of_size = functools.partial(made, name, target, own)
      found[name, task] = _plan(config, table[name], name, task, own, of_size)
  return found


def _plan(
  config: Settings,
  row: Row,
  name: str,
  task: str,
  own: Tuning,
  of_size: Callable[[int], Adaptation],
) -> Plan:
  """Returns the plan of a row on a task; `of_size` makes the functions for so many images."""
  target, recipe = config.target[task], config.recipe
  made = of_size(target.size)
  steps = target.size // recipe.batch_size
  if target.validation:
    every = target.validation_epochs * max(steps, 1)
    recipe = dataclasses.replace(recipe, eval_every=every, best_metric='accuracy')
  decides = {
    'network': networks.drawn_by(config.network) | {'pretrained': config.network.pretrained},
    'source': None if config.network.recipe is None else config.network.recipe,
    'target': {**identity(target), 'size': target.size},
    'method': {'name': name, 'model': own.model, 'options': own.options, 'pool': config.pool},
  }
  if row.decides is not None:
    decides['method']['settings'] = row.decides
  as_read = dataclasses.replace(target.data, train_size=target.size)
  title = f'{row.title}, {task}'
  training = Run(config, as_read, recipe, made.program, recipe.epochs * steps, decides, title)
  pairs = own.pairs(recipe)
  if len(pairs) == 1:
    return Plan(own, made, None, training)
  kept = target.size - config.held_out
  few = dataclasses.replace(as_read, train_size=kept)
  # Fewer images make shorter epochs: the schedule is to end where the search does.
  values = dict(zip(SWEPT, zip(*pairs, strict=True), strict=True))
  program, steps = sweep(of_size(kept).program, values), kept // recipe.batch_size
  plain = dataclasses.replace(recipe, eval_every=0, best_metric='')
  held_out = (config.held_out, config.held_out_order)
  decides = {**decides, 'held_out': held_out, 'steps_per_epoch': steps}
  title = f'{title}, {len(pairs)} settings'
  search = Run(config, few, plain, program, recipe.epochs * steps, decides, title)
  return Plan(own, made, search, training)


def first_alike(config: Settings) -> dict[tuple[str, str], str]:
  """Returns for every row and task the first task with the same training, if judged on other images."""
  first: dict[str, str] = {}
  found = {}
  for name, task in itertools.product(config.runs, config.tasks):
    target = dataclasses.replace(config.target[task], test=None, group='')
    key = repr((name, config.tuned(name, task), identity(target)))
    found[name, task] = first.setdefault(key, task)
  return found


def programs(config: Settings, table: Mapping[str, Row]) -> dict[str, Run]:
  """Returns each row's training on the first task, and that on the source task as `source`.

  Those on other tasks differ in the size of the head and in options of the same kind.
  """
  found = {}
  first = dataclasses.replace(config, tasks=config.tasks[:1])
  for (name, task), plan in plans(first, table).items():
    found[f'{name}_{task}'] = plan.training
    if plan.search is not None:
      found[f'{name}_{task}_search'] = plan.search
  source = source_training(config)
  return found if source is None else {**found, 'source': source}


def load(config: Settings, workdir: Any) -> Variables:
  """Returns the variables of the frozen network, without a classifier, from wherever its folder was left."""
  own = config.network
  if own.recipe is None:
    _, variables = networks.public(own, num_classes=None)
    return adaptation.without_classifier(config, variables)
  folder = workdir / 'source'
  loaded = networks.load(config, own, folder, source_training(config))
  say(f'source task: accuracy {loaded.score(loaded.variables)["accuracy"]:.4g}')
  return adaptation.without_classifier(config, loaded.variables)


def sources(config: Settings, target: Target) -> Sources:
  """Returns the records of a task; a few-shot set is drawn by the seed, or its list is, by `{seed}`."""
  split = target.data.train_split.format(seed=config.seed)
  train = harness_data.load(dataclasses.replace(target.data, train_split=split), 'train')
  if target.shots:
    drawn = data.few_shot_draws(config.seed, train, 1, target.shots, target.data.num_classes)
    train = data.subset(train, drawn.ravel())
  judged = target.test or target.data
  validation = None
  if target.validation:
    held = dataclasses.replace(target.data, test_split=target.validation)
    validation = harness_data.load(held, 'test')
  return Sources(train, harness_data.load(judged, 'test'), validation)


def require_sources(config: Settings) -> None:
  """Opens the records of all tasks, one after the other, and keeps none.

  Raises:
    ValueError: if the data of a task are not what the setting says.
    FileNotFoundError: if they are not there.
  """
  for task in config.tasks:
    sources(config, config.target[task])


def accuracy(
  config: Settings,
  made: Adaptation,
  own: Images,
  params: PyTree,
  frozen: PyTree,
  source: data.Source,
) -> float:
  """Returns the accuracy of an adapted network on records, read as test images, in percent."""
  correct = map_batches(
    functools.partial(judge, params, frozen, logits=made.logits, task=ImageTask.of(own)),
    source,
    batch_size=config.eval_batch_size,
    mesh=config.mesh.make(),
    **harness_data.reading(own, 'test'),
  )
  return 100 * float(correct.mean())


@functools.partial(jax.jit, static_argnames=('logits', 'task'))
def judge(params: PyTree, frozen: PyTree, batch: PyTree, *, logits: Any, task: ImageTask) -> Array:
  """Returns which records are classified correctly, `[batch]`."""
  return is_correct(logits(params, frozen, task.inputs(batch)), task.targets(batch))


def search(
  config: Settings,
  plan: Plan,
  target: Target,
  train: data.Source,
  variables: Variables,
  folder: Any,
) -> tuple[float, float]:
  """Returns the learning rate and weight decay that are best on held-out images; of several the first."""
  pairs = plan.own.pairs(config.recipe)
  if plan.search is None:
    return pairs[0]
  labels = data.source_labels(train)
  parts = held_out_rows(labels, config.held_out, config.held_out_order, config.seed)
  kept, held = (data.subset(train, part) for part in parts)
  frozen = plan.adaptation.frozen(variables, *np.transpose(pairs))

  def begin(state: Any) -> Any:
    many = lambda leaf: jnp.broadcast_to(leaf, (len(pairs), *leaf.shape))  # noqa: E731
    single = plan.adaptation.start(state, variables)
    own = jax.tree.map(many, single.params['network'])
    return state.replace(params={**state.params, 'network': own})

  found = runs.train(plan.search, kept, folder, frozen=frozen, begin=begin)
  scores = []
  for index, (rate, decay) in enumerate(pairs):
    params = jax.tree.map(lambda leaf, index=index: leaf[index], found.state.params)
    own = plan.adaptation.frozen(variables, rate, decay)
    scores.append(accuracy(config, plan.adaptation, target.data, params, own, held))
  scores = np.where(diverged(found.state), np.nan, scores)
  best = int(np.nanargmax(scores))
  told = ', '.join(f'{rate:g}/{decay:g}: {s:.3g}' for (rate, decay), s in zip(pairs, scores))
  say(f'{plan.search.title}: {told}')
  return pairs[best]


def adapt(
  config: Settings,
  plan: Plan,
  target: Target,
  own: Sources,
  variables: Variables,
  folder: Any,
) -> tuple[PyTree, float]:
  """Adapts the network to a task, from wherever `folder` was left; returns parameters and test accuracy.

  Args:
    config: the settings.
    plan: of `plans`.
    target: the task.
    own: its records.
    variables: of the frozen network.
    folder: of this training; that of a search is next to it.
  """
  rate, decay = search(
    config, plan, target, own.train, variables, folder.parent / f'{folder.name}_search'
  )
  made, evaluate = plan.adaptation, None
  frozen = made.frozen(variables, rate, decay)
  if own.validation is not None:
    evaluate = lambda now: {  # noqa: E731
      'accuracy': accuracy(config, made, target.data, now['params'], frozen, own.validation)
    }
  found = runs.train(
    plan.training, own.train, folder, frozen=frozen, evaluate=evaluate,
    begin=lambda state: made.start(state, variables),
  )  # fmt: skip
  params, judged = found.state.params, target.test or target.data
  return params, accuracy(config, made, judged, params, frozen, own.test)


def compare(config: Settings, workdir: Any, table: Mapping[str, Row]) -> list[dict[str, Any]]:
  """Returns the rows of the comparison: accuracies by task and group, and costs.

  What is wrong with the data of any task is told before the first training.
  """
  require_sources(config)
  variables, planned, trained_as = load(config, workdir), plans(config, table), first_alike(config)
  found: dict[str, dict[str, float]] = {name: {} for name in config.runs}
  for task in config.tasks:
    target = config.target[task]
    own = sources(config, target)
    for name in config.runs:
      first = trained_as[name, task]
      plan, folder = planned[name, first], workdir / f'{name}_{first}'
      _, found[name][task] = adapt(config, plan, target, own, variables, folder)
      say(f'{table[name].title}, {task}: accuracy {found[name][task]:.4g}')
  groups = {task: config.target[task].group for task in config.tasks}
  rows = []
  for name, scores in found.items():
    metrics = {**scores, **data.group_means(scores, groups), **costs(config, table[name], name)}
    rows.append(results.row(table[name].title, table[name].role, metrics))
  return rows


def costs(config: Settings, row: Row, name: str) -> dict[str, float]:
  """Returns what a step of a row costs on the first task: `COSTS`.

  Numbers that are trained, without and with the head; megabytes (10^6) of what the backward pass keeps
  (`adapters.residual_bytes`, as if nothing were fused), and of the temporaries of the compiled step on one
  device. Megabytes are those of another network where the settings say so (`accounted`).
  """
  task = config.tasks[0]
  target = config.target[task]
  judged = adaptation.adapted(config, row, config.tuned(name, task), target, target.size)
  params = jax.eval_shape(judged.program.init, jax.random.key(0)).params
  trained = {part: adapters.count_parameters(own) for part, own in params.items()}
  made = accounted(config, row, name)
  program = made.program
  state = jax.eval_shape(program.init, jax.random.key(0))
  given = program.frozen, program.batch, jax.eval_shape(step_keys, state)
  mesh = parallel.make_mesh(devices=jax.local_devices()[:1])
  needs = aot.report(aot.compile_step(program, mesh))['hbm']
  return {
    'trained': trained['tuned'] + trained['network'],
    'trained_with_head': sum(trained.values()),
    'residual_mb': adapters.residual_bytes(made.loss, state.params, *given) / 1e6,
    'temporary_mb': needs['temporaries'] / 1e6,
  }


def accounted(config: Settings, row: Row, name: str) -> Adaptation:
  """Returns a row's training on the first task as its memory is counted."""
  task = config.tasks[0]
  target, fields = config.target[task], dict(config.accounted)
  size = fields.pop('batch_size', config.recipe.batch_size)
  config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, batch_size=size))
  if 'image_size' in fields:
    sides = (fields['image_size'],) * 2
    images = (*sides, target.data.stored_image[-1])
    own = dataclasses.replace(target.data, stored_image=images, image_size=None)
    target = dataclasses.replace(target, data=own)
  return adaptation.adapted(config, row, config.tuned(name, task), target, target.size, **fields)


def metrics(config: Settings) -> list[str]:
  """Returns the metrics of a comparison, in the order of its table."""
  groups = dict.fromkeys(config.target[task].group for task in config.tasks)
  return [*config.tasks, *groups, 'mean', *COSTS]


def check(config: Settings, table: Mapping[str, Row]) -> Iterator[str]:
  """Yields what is wrong with rows, networks, and claims about them."""
  if unknown := sorted({*config.runs, *config.tuning} - {*table}):
    yield f'runs, tuning: {", ".join(map(repr, unknown))} are none of the rows {", ".join(table)}.'
    return
  for name, own in config.tuning.items():
    if wrong := sorted({*own.tasks} - {*config.target}):
      yield f'tuning.{name}.tasks: {wrong} are none of the targets {", ".join(config.target)}.'

  if can_be_built(config):
    yield from _check_methods(config, table)
  groups = [target.group for target in config.target.values()]
  names = [*config.target, *groups, 'mean', *COSTS]
  titles = [re.escape(row.title) for row in table.values()]
  yield from results.check_claims(config, titles, list(map(re.escape, names)))


def can_be_built(config: Settings) -> bool:
  """Returns whether nothing is wrong with what all rows build on, which their own errors would repeat."""
  wrong = [*config.network.check(), *problems(config.recipe)]
  return bool(config.tasks) and {*config.tasks} <= {*config.target} and not wrong


def _check_methods(config: Settings, table: Mapping[str, Row]) -> Iterator[str]:
  """Yields what is wrong with the rows' options, and with the fields of the network that they change.

  A row is traced once for all tasks on which its options are the same, whatever the fields: they must leave
  variables as they are.
  """
  variables = functools.cache(lambda: _shapes(config))

  def compare_shapes(fields: Mapping[str, Any]) -> None:
    if _shapes(config, **fields) != variables():
      raise ValueError(f'model={fields}: expected fields that leave the variables as they are.')

  def build(name: str, task: str) -> None:
    target, own = config.target[task], config.tuned(name, task)
    made = adaptation.adapted(config, table[name], own, target, target.size)
    jax.eval_shape(made.program.init, jax.random.key(0))

  seen, wrong = set(), set()
  for name, task in itertools.product(config.runs, config.tasks):
    own, place, found = config.tuned(name, task), f'tuning.{name} on {task}', []
    fields, options = repr(sorted(own.model.items())), (name, repr(sorted(own.options.items())))
    if own.model and fields not in seen:
      found += found_by(place, compare_shapes, own.model)
    if options not in seen:
      found += found_by(place, build, name, task)
    seen |= {fields, options}
    wrong |= {name} if found else set()
    yield from found
  if config.accounted and not [*config.check_accounted()]:
    for name in (own for own in config.runs if own not in wrong):
      yield from found_by('accounted', accounted, config, table[name], name)


def _shapes(config: Settings, **fields: Any) -> PyTree:
  """Returns the shapes of the frozen network's variables, with some fields in place of its own."""
  model = adaptation.backbone(config, **fields)
  return models.abstract_variables(model, config.network.data.view)


def draw(config: Settings, rows: Sequence[Mapping[str, Any]], path: Any) -> None:
  """Draws accuracies by group over the bytes that a step keeps for the backward pass."""
  groups = [*dict.fromkeys(config.target[task].group for task in config.tasks)]
  with pictures.drawn(path, 1, len(groups), size=(4.2 * len(groups), 3.8), squeeze=False) as axes:
    for axis, group in zip(axes[0], groups, strict=True):
      for item in rows:
        if config.pictured and item['name'] not in config.pictured:
          continue
        own = item['metrics']
        marker = '*' if item['role'] == 'method' else 'o'
        axis.scatter(own['residual_mb'], own[group], marker=marker, s=60, label=item['name'])
      axis.set(xscale='log', xlabel='kept for the backward pass (MB)', title=group)
      axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel('accuracy (%)')
    axes[0, -1].legend(frameon=False, fontsize=7)
    axes[0, 0].figure.suptitle(pictures.title(config))
