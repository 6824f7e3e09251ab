"""One way to run a training: from wherever its folder was left, under one identity."""

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from experiments.harness import data as harness_data
from experiments.harness.sections import Experiment, Recipe
from experiments.harness.settings import identity
from jaxlab import data, parallel
from jaxlab.parallel import aot
from jaxlab.training import Program, TrainState, fit

PyTree = Any
Variables = dict[str, PyTree]


class Run(NamedTuple):
  """A training that can be started.

  Attributes:
    config: the experiment that it belongs to.
    data: the section that says how its records are read.
    recipe: of the training.
    program: what is compiled.
    num_steps: the step that it ends at.
    decides: sections, and runs (`Run.identity`) that it starts or learns from, by name: with seed, data and
      recipe all that decides what it ends with.
    title: its name on the screen; None: that of its folder.
    sampler: see `jaxlab.data.make_loader`.
    revise_at: numbers of finished steps behind which its state is revised, see `jaxlab.training.fit`.
  """

  config: Experiment
  data: Any
  recipe: Recipe
  program: Program
  num_steps: int
  decides: Mapping[str, Any] = {}
  title: str | None = None
  sampler: Callable[[data.Source], Callable[[int], np.ndarray]] | None = None
  revise_at: Collection[int] = ()

  def lower(self, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Returns the train step, lowered for a mesh."""
    return aot.lower_step(self.program, mesh)

  def trace(self) -> None:
    """Traces the train step: raises what is wrong with it.

    Raises:
      ValueError: if the step does not return a state of the kind that it was given.
    """
    state = jax.eval_shape(self.program.init, jax.random.key(0))
    new, _ = jax.eval_shape(self.program.step, state, self.program.frozen, self.program.batch)
    kinds = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, new)]
    if kinds[0] != kinds[1]:
      raise ValueError(f'{self.title}: a step changes the state from {kinds[0]} to {kinds[1]}.')

  @property
  def identity(self) -> dict[str, Any]:
    """The settings that decide what the run ends with; another's folder is refused."""
    own = {'data': self.data, 'recipe': self.recipe, 'num_steps': self.num_steps, **self.decides}
    if self.revise_at:
      own['revise_at'] = sorted(self.revise_at)
    return {'seed': self.config.seed, **identity(own)}


class Call(NamedTuple):
  """A computation that is compiled and is no training: a search, a forward pass.

  Attributes:
    make: `mesh -> (function, arguments)`: what is jitted, and the shapes it is called with, with shardings.
    donated: positions of arguments that results may overwrite.
  """

  make: Callable[[jax.sharding.Mesh], tuple[Callable[..., Any], tuple[Any, ...]]]
  donated: tuple[int, ...] = ()

  def lower(self, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Returns the computation, lowered for a mesh."""
    function, arguments = self.make(mesh)
    return jax.jit(function, donate_argnums=self.donated).lower(*arguments)

  def trace(self) -> None:
    """Traces the computation on one device: raises what is wrong with it."""
    function, arguments = self.make(parallel.make_mesh(devices=jax.devices()[:1]))
    jax.eval_shape(function, *arguments)


class Trained(NamedTuple):
  """What a run ends with.

  Attributes:
    variables: `{'params', ...}`, the parameters and the model's other collections.
    state: the whole train state.
    history: rows of metrics.
  """

  variables: Variables
  state: TrainState
  history: list[dict[str, Any]]


def train(
  run: Run,
  source: data.Source,
  folder: Any,
  *,
  frozen: PyTree = None,
  start: Mapping[str, PyTree] | None = None,
  fresh: Sequence[str] = (),
  begin: Callable[[TrainState], TrainState] | None = None,
  key: jax.Array | None = None,
  evaluate: Callable[[Variables], Mapping[str, float]] | None = None,
  inspect: Callable[[TrainState], Mapping[str, float]] | None = None,
  revise: Callable[[TrainState], TrainState] | None = None,
) -> Trained:
  """Returns what a run ends with, from wherever `folder` was left.

  Args:
    run: of `programs`.
    source: training records.
    folder: of this run alone.
    frozen: the values of `run.program.frozen`.
    start: variables that it starts from, all but those that match a pattern of `fresh`.
    fresh: patterns of paths (`head/scale`) that stay as drawn.
    begin: what is done to the drawn state, behind `start`.
    key: of the drawn values; default: the seed's.
    evaluate: `variables -> metrics`, every `recipe.eval_every` steps.
    inspect: `state -> metrics`, which are added to those of `evaluate`.
    revise: what is done to the state at `run.revise_at`.

  Raises:
    ValueError: for a folder of another run, or variables that do not fit.
  """
  config, recipe = run.config, run.recipe
  if start is not None:
    begin = _then(functools.partial(take_over, start=start, fresh=fresh), begin)
  feed = harness_data.loader(
    run.data, source, recipe.batch_size, mesh=config.mesh, seed=config.seed,
    sampler=run.sampler and run.sampler(source),
  )  # fmt: skip
  name = folder.name
  say(
    f'{name} ({run.title}): {run.num_steps} steps'
    if run.title
    else f'{name}: {run.num_steps} steps'
  )
  judged = evaluate is not None and recipe.eval_every

  def judge(state: TrainState) -> dict[str, float]:
    found = dict(evaluate(variables_of(state)))
    return found | dict(inspect(state) if inspect else {})

  try:
    state, history = fit(
      run.program,
      feed,
      num_steps=run.num_steps,
      key=jax.random.key(config.seed) if key is None else key,
      frozen=frozen,
      begin=begin,
      mesh=config.mesh.make(),
      workdir=str(folder),
      config={**run.identity, 'run': name},
      log_every=config.log_every,
      checkpoint_every=config.checkpoint_every,
      evaluate=judge if judged else None,
      eval_every=recipe.eval_every or None,
      best_metric=recipe.best_metric or None if judged else None,
      revise=revise,
      revise_at=run.revise_at,
      description=name,
    )
  finally:
    feed.close()
  if problem := not_falling(history):
    say(f'WARNING, {name}: {problem}')
  return Trained(variables_of(state), state, history)


def _then(
  first: Callable[[TrainState], TrainState], second: Callable[[TrainState], TrainState] | None
) -> Callable[[TrainState], TrainState]:
  return first if second is None else lambda state: second(first(state))


def not_falling(history: Sequence[Mapping[str, Any]]) -> str:
  """Returns what there is to say of a loss that never fell below its first row by 1 in 1000; '' if it did."""
  losses = [row['loss'] for row in history if 'loss' in row]
  if len(losses) < 3 or min(losses[1:]) < losses[0] - 1e-3 * abs(losses[0]):
    return ''
  return (
    f'the loss did not fall: {losses[0]:.4g} at first, {losses[-1]:.4g} at the end. Look at the learning '
    'rate and at the scale of the inputs.'
  )


def variables_of(state: TrainState) -> Variables:
  """Returns the model's variables out of a train state."""
  return {'params': state.params, **state.model_state}


def take_over(
  state: TrainState, start: Mapping[str, PyTree], fresh: Sequence[str] = ()
) -> TrainState:
  """Returns a drawn state with the variables of `start`, all but those that match a pattern of `fresh`.

  A moving average of the parameters (`supervised.program(average=...)`) starts with them, too.

  Raises:
    ValueError: for variables that `start` lacks or holds in another shape; all are listed.
  """
  new = matched(variables_of(state), start, fresh)
  params, extra = new.pop('params'), state.extra
  if isinstance(extra, Mapping) and 'average' in extra:
    extra = {**extra, 'average': params}
  return state.replace(params=params, model_state=new, extra=extra)


def matched(own: Variables, given: Mapping[str, PyTree], fresh: Sequence[str] = ()) -> Variables:
  """Returns `own` variables with those of `given` by path (or their shapes), but for `fresh` ones."""
  source, wrong, taken = traverse_util.flatten_dict(dict(given)), [], {}
  for path, leaf in traverse_util.flatten_dict(dict(own)).items():
    name = '/'.join(path[1:])
    taken[path] = leaf
    if any(re.fullmatch(pattern, name) for pattern in fresh):
      continue
    if path in source and source[path].shape == leaf.shape:
      taken[path] = source[path]
    else:
      held = source[path].shape if path in source else 'nothing'
      wrong.append(f'{"/".join(path)}: {leaf.shape} wanted, {held} given')
  if wrong:
    raise ValueError(
      'the variables to start from are of another architecture:\n  ' + '\n  '.join(wrong[:10])
    )
  return traverse_util.unflatten_dict(taken)


def say(text: str) -> None:
  """Prints a line, once for all processes."""
  if jax.process_index() == 0:
    print(text, flush=True)
