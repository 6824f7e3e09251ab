"""Ways to adapt a frozen network, compared: accuracy on every task, what is trained, what is kept."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import data as harness_data
from experiments.harness import networks, pictures, results, runs
from experiments.harness.data import Images
from experiments.harness.runs import Run, Variables, say
from experiments.harness.settings import identity
from experiments.harness.tasks import ImageTask, is_correct
from experiments.protocols import adaptation
from experiments.protocols.adaptation import SWEPT, Adaptation, Row, Settings, Target
from experiments.protocols.adaptation_costs import COSTS, costs
from experiments.protocols.adaptation_tuning import Tuning
from experiments.protocols.hold_out import held_out_rows
from experiments.protocols.replicas import diverged, sweep
from jaxlab import data
from jaxlab.training import map_batches

Array = jax.Array
PyTree = Any

UNITS = 'accuracy in %; numbers that are trained; megabytes of a step'


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
    key = repr((name, config.tuned(name, task), training_key(config.target[task])))
    found[name, task] = first.setdefault(key, task)
  return found


def training_key(target: Target) -> str:
  """Returns what tells the training of a task from others: all but the images it is judged on."""
  return repr(identity(dataclasses.replace(target, test=None, group='')))


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
  opened = set()
  for task in config.tasks:
    target, first = config.target[task], training_key(config.target[task])
    if first not in opened:
      sources(config, target)
    elif target.test is not None:
      harness_data.load(target.test, 'test')
    opened.add(first)


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


def metrics(config: Settings) -> list[str]:
  """Returns the metrics of a comparison, in the order of its table."""
  groups = dict.fromkeys(config.target[task].group for task in config.tasks)
  return [*config.tasks, *groups, 'mean', *COSTS]


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
