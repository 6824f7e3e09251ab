"""Stethoscope for Networks: Who Reasons in the Large Language Models? (Shao & Wu, NeurIPS 2025).

Where in a decoder does a capability lie? Four tools on a network A and the network B that it was tuned to.
Delta: how much each module type changed. Merge: A with one type of B's. Freeze: A is tuned again, some types
alone (with norms, embedding and head). Destruction: types of the middle blocks are disabled. The paper's
answer for reasoning is attention's output projection. Claim that is judged here: tuning it, too (F2), fits
unseen working better than tuning norms, embedding and head alone (F1); everything else is reported.

  python -m experiments.sfn
  python -m experiments.sfn --config=checkpoints --config.base=DIR --config.tuned=DIR --workdir=DIR
  python -m experiments.sfn --config=qwen2_5_14b --workdir=DIR
"""

import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
from flax import linen as nn

from experiments.harness import costs, launcher, networks, pictures, results, runs, supervised
from experiments.harness import data as harness_data
from experiments.harness.data import Completions
from experiments.harness.networks import Network
from experiments.harness.runs import Call, Run, Variables, say
from experiments.harness.sections import Recipe, check_batch
from experiments.harness.settings import found_by, free
from experiments.harness.tasks import Task
from experiments.protocols import boxed_answers, checkpoint_pairs, completions
from experiments.protocols.boxed_answers import Answers
from experiments.protocols.completions import completion_loss
from jaxlab import data, models
from jaxlab.models import LazyStateDict
from jaxlab.models.checkpoint_names import HF_LLAMA

BEFORE = 'before tuning'
ATTENTION = ('q_proj', 'k_proj', 'v_proj', 'o_proj')
# What Freeze trains besides norms, embedding and head; F1 to F4 are the paper's.
TYPES: dict[str, tuple[str, ...]] = {
  'F1': (),
  'F2': ('o_proj',),
  'F3': ATTENTION,
  'F4': ('.*',),
  'qkv': ATTENTION[:3],
  'mlp': ('mlp',),
}
TITLES = {
  'F1': 'F1: embedding, head',
  'F2': 'F2: with o_proj',
  'F3': 'F3: with q, k, v, o',
  'F4': 'F4: all',
  'qkv': 'with q, k, v',
  'mlp': 'with the MLPs',
}
METRICS = (
  *completions.METRICS, *boxed_answers.METRICS, 'trained', 'flops', 'time', 'memory', 'merged',
  *checkpoint_pairs.METRICS, 'zero', 'reinit', 'remove',
)  # fmt: skip
UNITS = 'losses of a token in nats; shares, exact_match and right_answers in %'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
  """What A is tuned on, and how."""

  data: Completions
  recipe: Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(checkpoint_pairs.Settings):
  """Settings of SfN: of a network that is tuned here, or of two checkpoints.

  Attributes:
    network: A; trained here, or with public weights; None: A and B are the checkpoints `base` and `tuned`.
    tuning: what the variants of Freeze are tuned on.
    runs: variants of Freeze; B is 'F4', the network all of which is tuned.
    destroyed: groups of module types that are destroyed in A.
    blocks: first and end of the blocks in which they are.
    std: deviation of the entries that are drawn in place of the destroyed ones.
    compared: whether A and B are written as checkpoints and compared, by one process that holds both.
    answers: problems that every network answers; None: none.
    timed: repeats of the measurement of a step's cost; 0: none.
  """

  network: Network | None = None
  tuning: Tuning | None = None
  runs: tuple[Literal['F1', 'F2', 'F3', 'F4', 'qkv', 'mlp'], ...] = ()
  destroyed: tuple[tuple[str, ...], ...] = ()
  blocks: tuple[int, int] = (0, 0)
  std: float = 0.02
  compared: bool = True
  answers: Answers | None = None
  timed: int = free(0)

  @property
  def model(self) -> nn.Module:
    """The decoder."""
    return networks.create(self.network.model)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    if (self.network is None) == (not self.base or not self.tuned):
      yield 'base, tuned: expected two checkpoints, or a network that is tuned, not both.'
    if (self.network is None) != (self.tuning is None):
      yield 'tuning: expected what a network is tuned on, with network alone.'
    if not (self.std >= 0 and math.isfinite(self.std)):
      yield f'std={self.std}: expected a deviation.'
    if self.timed < 0:
      yield f'timed={self.timed}: expected a number of repeats, or 0 for none.'
    if not all(self.destroyed):
      yield 'destroyed: expected groups of module types, got an empty one.'
    if len(set(self.runs)) < len(self.runs):
      yield f'runs={",".join(self.runs)}: each may be there once.'
    if self.network is None:
      for name in ('runs', 'destroyed', 'blocks', 'std', 'compared', 'timed'):
        if (value := getattr(self, name)) != getattr(Settings, name):
          yield f'{name}={value}: is of a network that is tuned here, not of two checkpoints.'


def pretraining(config: Settings) -> Run | None:
  """Returns the training of A; None: A has public weights."""
  if config.network.pretrained:
    return None
  return networks.training(config, config.network, 'A', loss=completion_loss)


@functools.lru_cache
def shapes(model: nn.Module, task: Task) -> Mapping[str, Any]:
  """Returns the shapes of a decoder's parameters."""
  return supervised.abstract_variables(model, task)['params']


def tuning(config: Settings, name: str) -> Run:
  """Returns a variant of Freeze: A is tuned, its chosen types with norms, embedding and head alone."""
  trained = models.tuned_parameters(shapes(config.model, config.network.task), TYPES[name])
  own = dataclasses.replace(
    config.network, data=config.tuning.data, recipe=config.tuning.recipe, pretrained='', weights=''
  )
  first = pretraining(config)
  start = config.network.pretrained if first is None else first.identity
  return networks.training(
    config, own, TITLES[name], loss=completion_loss, frozen=models.unselected(trained),
    decides={'types': TYPES[name], 'start': start},
  )  # fmt: skip


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  rows = [BEFORE, *TITLES.values(), *(checkpoint_pairs.title(types) for types in config.merges)]
  rows += [', '.join(types) for types in config.destroyed]
  yield from results.check_claims(config, [*map(re.escape, rows), r'[\w/]+'], METRICS)
  if config.network is None or config.tuning is None:
    return
  if config.network.pretrained and config.network.recipe is not None:
    yield 'network: expected public weights or a recipe, not both.'
  if not config.runs:
    yield f'runs is empty; runs: {", ".join(TYPES)}.'
  if config.merges and 'F4' not in config.runs:
    yield "merges: B is the run 'F4', which is none of runs."
  for name, own in (('network', config.network), ('tuning', config.tuning)):
    if not isinstance(own.data, Completions):
      yield f'{name}.data: expected completions, got {own.data.name!r}.'
    elif own.recipe is not None:
      yield from check_batch(config.mesh, own.recipe.batch_size, f'{name}.recipe.batch_size')
      if own.data.train_size < own.recipe.batch_size:
        yield f'{name}.recipe.batch_size={own.recipe.batch_size}: more than {own.data.train_size} records.'
  found = list(found_by('network.model', networks.create, config.network.model))
  if found or not isinstance(config.network.data, Completions):
    return  # said by the section
  params = shapes(config.model, config.network.task)
  for name in dict.fromkeys(config.runs):
    yield from found_by('runs', models.tuned_parameters, params, TYPES[name])
  for types in config.merges:
    yield from found_by('merges', models.select_parameters, params, types)
  for types in config.destroyed:
    yield from found_by(
      'destroyed, blocks', models.select_parameters, params, types, blocks=range(*config.blocks)
    )


def programs(config: Settings, facts: None = None) -> dict[str, Run | Call]:
  """Returns the training of A, the variants of Freeze, and how problems are answered, as far as there are."""
  del facts
  own: dict[str, Run | Call] = {}
  if config.network is not None:
    first = pretraining(config)
    own |= {} if first is None else {'base': first}
    own |= {name: tuning(config, name) for name in config.runs}
  return own | ({'answers': boxed_answers.program(config.answers)} if config.answers else {})


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Compares two checkpoints, or trains, tunes and destroys a network."""
  if config.network is None:
    return compare_checkpoints(config, workdir)
  train, test = tuning_data(config)
  answer = answering(config, workdir)
  base = networks.load(config, config.network, workdir / 'base', pretraining(config))
  rows, tuned = freeze(config, workdir, base.variables, train, test, answer)
  parts = destruction(config, base)
  if tuned is not None:
    rows += merging(config, base.variables, tuned, test)
  if tuned is not None and config.compared:
    for name, own in deltas(config, base.variables, tuned, workdir).items():
      parts[name] = parts.get(name, {}) | own
  rows += checkpoint_pairs.rows(parts)
  draw(config, rows, workdir / 'freeze_and_destruction.png')
  return results.results(config, rows, title=UNITS)


def tuning_data(config: Settings) -> tuple[data.Source, data.Source]:
  """Returns the training and the test records of the tuning, whose tokens the decoder knows."""
  own = config.tuning.data
  train, test = (harness_data.load(own, split) for split in ('train', 'test'))
  for source in (train, test):
    harness_data.check_vocabulary(own, source, config.model)
  return train, test


def freeze(
  config: Settings,
  workdir: pathlib.Path,
  start: Variables,
  train: data.Source,
  test: data.Source,
  answer: Callable[[str, Variables], dict[str, float]],
) -> tuple[list[dict[str, Any]], Variables | None]:
  """Returns the rows of A and of the variants of Freeze, and B, if it is one of them.

  Args:
    config: the experiment.
    workdir: of the trainings.
    start: A.
    train: what is tuned on.
    test: what is judged on.
    answer: see `answering`.
  """
  judge = lambda variables: completions.judge(  # noqa: E731
    config, config.tuning.data, config.model, variables, test
  )
  own = judge(start) | answer('before', start)
  rows, tuned = [results.row(BEFORE, 'reference', own)], None
  trainings = {name: tuning(config, name) for name in config.runs}
  cost = step_costs(config, trainings) if config.timed else {}
  for name, training in trainings.items():
    own = runs.train(training, train, workdir / name, start=start).variables
    metrics = judge(own) | answer(name, own) | cost.get(name, {})
    tuned = own if name == 'F4' else tuned
    mask = models.tuned_parameters(start['params'], TYPES[name])
    metrics['trained'] = share(start['params'], mask)
    say(f'{TITLES[name]}: ' + ', '.join(f'{key} {value:.4g}' for key, value in metrics.items()))
    role = 'method' if name == 'F2' else 'baseline'
    rows.append(results.row(TITLES[name], role, metrics))
  return rows, tuned


def share(params: Any, mask: Any) -> float:
  """Returns the percentage of parameters that a mask chooses."""
  sizes = [
    (leaf.size, own) for leaf, own in zip(*map(jax.tree.leaves, (params, mask)), strict=True)
  ]
  return 100 * sum(size for size, own in sizes if own) / sum(size for size, _ in sizes)


def answering(
  config: Settings, workdir: pathlib.Path
) -> Callable[[str, Variables], dict[str, float]]:
  """Returns what answers the problems with some variables, and says how many are right; {} without any.

  Outputs of the network `name` are kept in `answers/<name>.json`.
  """
  if config.answers is None:
    return lambda name, variables: {}
  problems = boxed_answers.load(config.answers)
  names = ('seed', 'base', 'tuned', 'untie', 'base_share', 'network', 'tuning')
  made = [str(getattr(config, name)) for name in names]
  return lambda name, variables: boxed_answers.judge(
    config.answers, variables, problems, workdir / 'answers' / f'{name}.json', [name, *made]
  )


def step_costs(config: Settings, trainings: Mapping[str, Run]) -> dict[str, dict[str, float]]:
  """Returns `time`, `memory` and `flops` of a step of each variant, over those of full tuning."""
  sides = {name: own.program for name, own in ({'F4': tuning(config, 'F4')} | trainings).items()}
  sides = {name: costs.Side(program) for name, program in sides.items()}
  return costs.relative(sides, 'F4', config.mesh.make(), config.timed)


def destruction(config: Settings, base: networks.Loaded) -> dict[str, dict[str, float]]:
  """Returns by how much A's own loss rises where module types of the middle blocks are destroyed.

  `zero` and `reinit` by type; `remove`, in the row of all types, where whole blocks are skipped.
  """
  params, found = base.variables['params'], {}
  if not config.destroyed:
    return found

  def loss(params: Any, hooks: Sequence[models.Hook] = ()) -> float:
    variables = {**base.variables, 'params': params}
    own = config.network.data
    return completions.judge(config, own, config.model, variables, base.test, hooks)['loss']

  whole, blocks = loss(params), range(*config.blocks)
  say(f'A: loss {whole:.4g} on its own test records')
  for types in config.destroyed:
    mask = models.select_parameters(params, types, blocks=blocks)
    drawn = models.destroy_parameters(params, mask, jax.random.key(config.seed), config.std)
    zeroed = models.destroy_parameters(params, mask)
    name = ', '.join(types)
    found[name] = {'zero': loss(zeroed) - whole, 'reinit': loss(drawn) - whole}
    say(f'without {name}: loss +{found[name]["zero"]:.4g}')
  paths = [models.anatomy(config.model).block_paths[index] for index in blocks]
  removed = loss(params, [models.remove_blocks(paths)]) - whole
  found['whole blocks'] = {'remove': removed}
  return found


def merging(
  config: Settings, base: Variables, tuned: Variables, test: data.Source
) -> list[dict[str, Any]]:
  """Returns rows of A with module types of B, judged on test records."""
  rows = []
  for types in config.merges:
    mask = models.select_parameters(base['params'], types)
    merged = models.merge_parameters(base['params'], tuned['params'], mask, config.base_share)
    own = completions.judge(
      config, config.tuning.data, config.model, {**base, 'params': merged}, test
    )
    own['merged'] = share(base['params'], mask)
    rows.append(results.row(checkpoint_pairs.title(types), 'reference', own))
  return rows


def deltas(
  config: Settings, base: Variables, tuned: Variables, workdir: pathlib.Path
) -> dict[str, dict[str, float]]:
  """Draws and returns how much each module type of B differs from A's; writes both as checkpoints."""
  both = [jax.device_get(own) for own in (base, tuned)]
  for name, own in zip(('A', 'B'), both):
    arrays = models.to_torch(own, renames=HF_LLAMA)
    models.save_state_dict(os.fspath(workdir / 'checkpoints' / name), arrays, overwrite=True)
  changes = list(
    models.parameter_changes(*(own['params'] for own in both), bins=config.bins or None)
  )
  checkpoint_pairs.draw(config, changes, workdir)
  return checkpoint_pairs.delta(changes)


def compare_checkpoints(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Compares two checkpoints tensor by tensor, and writes what they are merged to."""
  if config.answers is not None:
    for checkpoint in (config.base, config.tuned):
      boxed_answers.require_model(config.answers, checkpoint)
  answer = answering(config, workdir)

  def answered(name: str, state_dict: LazyStateDict) -> dict[str, float]:
    if config.answers is None:
      return {}
    return answer(name, models.from_torch(networks.create(config.answers.model), state_dict))

  return results.results(
    config,
    checkpoint_pairs.compare(config, workdir, answered),
    title='norms; shares and right_answers in %',
  )


def draw(config: Settings, rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Draws losses behind tuning and merging, and what destroying costs."""
  panels: dict[str, Callable[[Mapping[str, float]], dict[str, float]]] = {
    'loss of unseen working and answers': lambda own: (
      {'loss': own['loss']} if 'loss' in own else {}
    ),
    'rise of the loss of A': lambda own: {
      name: own[name] for name in ('zero', 'reinit', 'remove') if name in own
    },
  }
  with pictures.drawn(path, 1, 2, size=(11, 4)) as axes:
    for axis, (title, pick) in zip(axes, panels.items()):
      shown = [(item, pick(item['metrics'])) for item in rows if pick(item['metrics'])]
      kinds = list(dict.fromkeys(kind for _, own in shown for kind in own))
      for offset, kind in enumerate(kinds):
        places = [i + offset / (len(kinds) + 1) for i, (_, own) in enumerate(shown) if kind in own]
        values = [own[kind] for _, own in shown if kind in own]
        axis.barh(places, values, 1 / (len(kinds) + 1), label=kind)
      axis.set_yticks(range(len(shown)), [item['name'] for item, _ in shown], fontsize=8)
      axis.invert_yaxis()
      axis.set_xlabel(title)
      axis.grid(alpha=0.3, axis='x')
      if len(kinds) > 1:
        axis.legend(frameon=False, fontsize=8)
    axes[0].figure.suptitle(pictures.title(config))


if __name__ == '__main__':
  launcher.main('sfn')
