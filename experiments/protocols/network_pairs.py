"""Two networks of one architecture, drawn differently, that learn side by side from noisy labels.

One step trains both, each by its own loss and with its own optimizer; what each learns from may depend on
what both say of the batch. A step's program holds their parameters as `params['first']`, `params['second']`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import networks, runs, supervised
from experiments.harness.runs import Run, Trained, Variables
from experiments.harness.sections import Recipe
from experiments.protocols import noisy_labels
from experiments.protocols.noisy_labels import Settings, Sources
from jaxlab import losses
from jaxlab.training import (
  Initial,
  LossState,
  Out,
  Program,
  TrainState,
  by_path,
  cast_floating,
  make_program,
)

Array = jax.Array
PyTree = Any

NAMES = ('first', 'second')

# `(logits1, logits2, labels, step) -> losses of both`; a loss must not reach the other network's logits.
PairLoss = Callable[[Array, Array, Array, Array], losses.PairLoss]


def program(
  config: Settings,
  recipe: Recipe,
  loss: PairLoss,
  *,
  options: Mapping[str, Any] | None = None,
  frozen: Sequence[str] = (),
  best: Callable[[Variables], PyTree] | None = None,
) -> Program:
  """Returns the training of two networks as pure functions.

  Metrics are `loss` (the sum of both), `accuracy` on the given labels and `disagreement`, means of both
  networks; and, where the noise is known, the shares of the batch with a right label (`labels_correct`), that
  are kept by their loss (`kept`), and that are kept and right (`kept_correct`).

  Args:
    config: the settings.
    recipe: of the training.
    loss: of both networks.
    options: of the optimizer, in place of its section's, such as a schedule of `betas`.
    frozen: patterns of parameters of a network that stay.
    best: what `keep_best` keeps of a network's variables; None: nothing is kept.
  """
  model, task = noisy_labels.network(config), config.task
  schedule = recipe.schedule.make(recipe.epochs, noisy_labels.steps_per_epoch(config, recipe))
  dtype = recipe.program_options['compute_dtype'] or 'float32'

  def optimizer(name: str) -> optax.GradientTransformation:
    patterns = [f'{name}/{pattern}' for pattern in frozen]
    return recipe.optimizer.make(schedule, patterns, **(options or {}))

  def init(key: Array) -> Initial:
    key, streams = supervised.streams(key)
    views = supervised.abstract_inputs(task)
    blank = jnp.zeros(views.shape, views.dtype)
    drawn = [dict(model.init(own, blank)) for own in jax.random.split(key)]
    params, state = of_both([own.pop('params') for own in drawn]), _by_collection(drawn)
    extra = {}
    if best is not None:
      kept = {name: best(member({'params': params, **state}, name)) for name in NAMES}
      extra['best'] = {name: (jnp.float32(-jnp.inf), tree) for name, tree in kept.items()}
    return Initial(params, state, extra, streams)

  def own_loss(
    params: PyTree, state: LossState, batch: PyTree, keys: dict[str, Array]
  ) -> tuple[Array, Out]:
    each = jax.vmap(functools.partial(jax.random.fold_in, keys['augment']))(batch['index'])
    x, labels = cast_floating(task.augmented(each, batch), dtype), task.targets(batch)
    outputs, changed = [], []
    for index, name in enumerate(NAMES):
      key = jax.random.fold_in(keys['dropout'], index)
      logits, new = model.apply(
        member({'params': params, **state.model_state}, name),
        x,
        mutable=list(state.model_state),
        rngs={'dropout': key, 'drop_path': jax.random.fold_in(key, 1)},
        **task.options,
      )
      outputs.append(logits.astype(jnp.float32))
      changed.append(new)
    found = loss(*outputs, labels, state.step)
    right = [task.score(logits, labels)['correct'] for logits in outputs]
    metrics = {
      'accuracy': jnp.mean(jnp.stack(right)),
      'learning_rate': schedule(state.step),
      'disagreement': jnp.mean(~found.aux.agree),
    }
    if state.frozen:
      true = state.frozen['true'][batch['index']] == labels
      kept = jnp.stack([found.aux.keep1, found.aux.keep2])
      metrics |= {
        'labels_correct': jnp.mean(true),
        'kept': jnp.mean(kept),
        'kept_correct': jnp.mean(kept & true),
      }
    return found.loss1 + found.loss2, Out(_by_collection(changed), metrics=metrics)

  given = {'true': jax.ShapeDtypeStruct((config.data.size,), jnp.int32)}
  return make_program(
    init,
    own_loss,
    by_path([(f'{name}/.*', optimizer(name)) for name in NAMES]),
    task.batch(recipe.batch_size),
    frozen=given if config.data.noise else None,
    **recipe.program_options,
  )


def of_both(trees: Sequence[PyTree]) -> dict[str, PyTree]:
  """Returns what the two networks have by their names."""
  return dict(zip(NAMES, trees, strict=True))


def _by_collection(states: Sequence[Mapping[str, PyTree]]) -> dict[str, PyTree]:
  """Returns the collections of both networks, each by the networks' names."""
  return {name: of_both([own[name] for own in states]) for name in states[0]}


def member(variables: Mapping[str, PyTree], name: str) -> Variables:
  """Returns the variables of one network."""
  return {collection: tree[name] for collection, tree in variables.items()}


def joined(each: Mapping[str, Variables]) -> Variables:
  """Returns the variables of the pair."""
  return _by_collection([each[name] for name in NAMES])


def require_different(params: Mapping[str, PyTree]) -> None:
  """Raises ValueError if both networks have the same parameters: they would agree on everything, forever."""
  pairs = zip(*(jax.tree.leaves(params[name]) for name in NAMES), strict=True)
  # Compared on the devices: shards of a leaf may lie on other hosts.
  if not any(bool(jnp.any(a != b)) for a, b in pairs):
    raise ValueError(
      'Both networks start from the same parameters, and would agree forever: draw them by different keys.'
    )


def train(
  config: Settings,
  run: Run,
  sources: Sources,
  folder: Any,
  *,
  start: Variables | None = None,
  fresh: Sequence[str] = (),
  keeps: Callable[[Variables], PyTree] | None = None,
) -> Trained:
  """Returns what two networks end with.

  `history` has the test accuracies `test_first` and `test_second`, and their mean `test`, every
  `recipe.eval_every` steps.

  Args:
    config: the settings.
    run: a training of `program`.
    sources: the data.
    folder: of this run.
    start: variables of the pair that it starts from.
    fresh: patterns of paths, in one network, that stay as drawn.
    keeps: `best` of the program: at `run.revise_at` it is kept of networks that are better than before.
  """
  model = noisy_labels.network(config)

  def accuracy(variables: Variables) -> float:
    given = model, config.task, variables, sources.test
    return networks.accuracy(config, config.data, *given)

  def evaluate(variables: Variables) -> dict[str, float]:
    each = {name: accuracy(member(variables, name)) for name in NAMES}
    return {'test': sum(each.values()) / 2, **{f'test_{k}': v for k, v in each.items()}}

  def begin(state: TrainState) -> TrainState:
    require_different(state.params)
    return state

  given: dict[str, Any] = {}
  if run.program.frozen:
    given['frozen'] = {'true': jnp.asarray(sources.true, jnp.int32)}
  if start is not None:
    given |= {'start': start, 'fresh': [f'({"|".join(NAMES)})/{pattern}' for pattern in fresh]}
  if keeps is not None:
    given['revise'] = lambda state: keep_best(state, keeps, accuracy)
  trained = runs.train(run, sources.train, folder, begin=begin, evaluate=evaluate, **given)
  if keeps is None:
    return trained
  # The last step is not followed by another, between which the state could be revised.
  state = keep_best(trained.state, keeps, accuracy)
  return trained._replace(state=state)


def keep_best(
  state: TrainState,
  keeps: Callable[[Variables], PyTree],
  accuracy: Callable[[Variables], float],
) -> TrainState:
  """Returns the state with what is kept of each network at its best accuracy, in `extra['best']`."""
  found = {}
  for name, (best, kept) in state.extra['best'].items():
    variables = member(runs.variables_of(state), name)
    now = accuracy(variables)
    better = now > float(best)
    found[name] = (np.float32(now), keeps(variables)) if better else (best, kept)
  return state.replace(extra={**state.extra, 'best': found})


def scores(history: Sequence[Mapping[str, Any]], last_steps: int) -> dict[str, float]:
  """Returns what a training of two networks came to, all in %.

  `last` and `best`: test accuracy, the mean of both networks, see `noisy_labels.scores`; `better`: of the
  better network at its best. Of the last `last_steps` steps `disagreement`, and `kept_correct`, the share of
  right labels among the examples that were kept by their loss, if any were.
  """
  found = noisy_labels.scores(history)
  judged = [line[f'test_{name}'] for line in history if 'test' in line for name in NAMES]
  end = max(line['step'] for line in history) - last_steps
  lines = [line for line in history if line['step'] > end and 'disagreement' in line]
  found |= {'fall': found['best'] - found['last'], 'better': max(judged)}
  found['disagreement'] = 100 * float(np.mean([line['disagreement'] for line in lines]))
  if any(line.get('kept') for line in lines):
    found['kept_correct'] = 100 * precision(lines)
  return found


def precision(lines: Sequence[Mapping[str, Any]]) -> float:
  """Returns the share of right labels among kept examples over some rows of metrics."""
  return sum(line['kept_correct'] for line in lines) / sum(line['kept'] for line in lines)


METRICS = ('last', 'best', 'fall', 'better', 'disagreement', 'kept_correct')


def classifier(config: Settings) -> Callable[[Variables], PyTree]:
  """Returns `variables -> those that a training of the classifier alone changes`."""
  names = {path.split('/')[0] for path in noisy_labels.head(config)}

  def changed(variables: Variables) -> PyTree:
    own = {name: tree for name, tree in variables['params'].items() if name in names}
    return {**variables, 'params': own}

  return changed


def best_of(trained: Trained) -> Variables:
  """Returns the pair's variables with what was kept of each network at its best."""
  found = {}
  for name, (_, kept) in trained.state.extra['best'].items():
    own = member(trained.variables, name)
    found[name] = {**own, **kept, 'params': {**own['params'], **kept['params']}}
  return joined(found)
