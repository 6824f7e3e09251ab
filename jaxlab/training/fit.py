"""The training loop: one for all programs, meshes and hosts."""

import collections
import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlab.data.pipeline import prefetch_to_device
from jaxlab.parallel import batch_sharding, is_primary, make_mesh, place, shard_program
from jaxlab.training.checkpoints import Checkpoints, not_finite
from jaxlab.training.feed import DataIterator, Declared
from jaxlab.training.lock import locked
from jaxlab.training.metrics import MetricWriter, Progress
from jaxlab.training.state import Program, TrainState
from jaxlab.training.stopping import catch_signals

PyTree = Any

# Steps that may be under way on the device while the host prepares the next: enough to keep it busy,
# few enough that their batches fit into its memory and that SIGTERM is answered at once.
_STEPS_AHEAD = 4
_BATCHES_AHEAD = 2


def fit(
  program: Program,
  data: DataIterator,
  *,
  num_steps: int,
  key: jax.Array,
  frozen: PyTree = None,
  begin: Callable[[TrainState], TrainState] | None = None,
  mesh: Mesh | None = None,
  workdir: str | None = None,
  config: Mapping[str, Any] | None = None,
  log_every: int = 50,
  checkpoint_every: int = 1000,
  keep: int = 2,
  evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
  eval_every: int | None = None,
  best_metric: str | None = None,
  best_mode: str = 'max',
  revise: Callable[[TrainState], TrainState] | None = None,
  revise_at: Collection[int] = (),
  description: str = 'train',
) -> tuple[TrainState, list[dict[str, Any]]]:
  """Runs `program` up to step `num_steps`, from the start or from where `workdir` was left.

  The step is compiled once, the state lives on the mesh and is donated from step to step, and metrics
  stay on the device until they are logged: the host runs a few steps ahead and waits for results only
  where it logs, evaluates or saves.

  Killed at any moment and called again with the same arguments, it ends with the same parameters, bit for
  bit; on another mesh it goes on from the same state. SIGTERM and Ctrl-C save and exit with status 0, at once
  while `evaluate` runs. An `evaluate` that raises loses no step: what was trained is saved, and judged when
  the run goes on.

  Args:
    program: the pure functions, see `Program`.
    data: endless iterator of this process's part of each batch, see `DataIterator`.
    num_steps: the step to end at.
    key: draws the initial state.
    frozen: the values of `program.frozen`. A `workdir` that was started with others is refused.
    begin: applied to the drawn state, e.g. to put a trained network's variables in.
    mesh: from `make_mesh`; all devices along `data` if None.
    workdir: for checkpoints (`checkpoints/`), the config and metrics (`metrics.jsonl`, TensorBoard); with
      None nothing is written and nothing survives.
    config: the run's settings. A `workdir` that holds a run of other settings is refused.
    log_every: steps between rows of metrics; a row holds their means since the last one.
    checkpoint_every: steps between checkpoints; the last step is always saved.
    keep: how many of the newest checkpoints to keep.
    evaluate: `state -> {name: number}`, called in all processes every `eval_every` steps and at the end.
    eval_every: None for the end only.
    best_metric: a name in what `evaluate` returns: the best state by it is kept as well, and returned.
    best_mode: `max` or `min`.
    revise: what is done to the state between steps: labels predicted anew, clusters found, examples chosen. A
      function of the state alone; its step counter and shapes stay.
    revise_at: numbers of finished steps behind which `revise` is called, once each, 0 for the beginning. What
      is saved at such a step is the state before it.
    description: the run's name on the screen.

  Returns:
    The final state (with `best_metric` the best one), and the rows of metrics (`{'step': ..., 'loss': ...,
    ...}`) from step 1 on.

  Raises:
    ValueError: before the first step, if config, mesh, batch, rules, `frozen` or `workdir` do not fit
      together, if another process runs in `workdir`, or if the run there is beyond `num_steps`.
    FloatingPointError: if the loss (the metric `loss`), a parameter or a statistic of the model is not
      finite, or `best_metric` never was; names the step, its other metrics that are not finite, and the
      last good checkpoint. Such a state is neither saved nor returned.
    SystemExit: with status 0, after SIGTERM or Ctrl-C; a second Ctrl-C ends at once.
  """
  for name, every in {'log_every': log_every, 'checkpoint_every': checkpoint_every}.items():
    if every < 1:
      raise ValueError(f'{name}={every}, expected a positive number of steps.')
  if eval_every is not None and eval_every < 1:
    raise ValueError(f'eval_every={eval_every}, expected a positive number of steps, or None.')
  if revise_at and revise is None:
    raise ValueError(f'revise_at={sorted(revise_at)} needs revise=, which changes the state there.')
  if wrong := [step for step in revise_at if not 0 <= step < num_steps]:
    raise ValueError(f'revise_at holds {sorted(wrong)}, expected steps from 0 to {num_steps - 1}.')
  if best_metric and not evaluate:
    raise ValueError(f'best_metric={best_metric!r} needs evaluate=, which returns it.')
  if best_metric and workdir is None:
    raise ValueError(f'best_metric={best_metric!r} needs a workdir, where the best state is kept.')
  if num_steps < 0:
    raise ValueError(f'num_steps={num_steps}, expected a number >= 0.')
  mesh = make_mesh() if mesh is None else mesh
  sharded = shard_program(program, mesh)
  frozen = place({} if frozen is None else frozen, sharded.frozen, 'frozen arrays')
  with contextlib.ExitStack() as stack:
    stopping = stack.enter_context(catch_signals(workdir is not None))
    checkpoints, start, state, position = None, 0, None, None
    with stopping.at_once():
      if workdir is not None:
        stack.enter_context(locked(workdir))
        checkpoints = Checkpoints(
          workdir,
          config=config,
          frozen=frozen,
          keep=keep,
          best_metric=best_metric,
          best_mode=best_mode,
        )
        stack.callback(checkpoints.close)
        if checkpoints.steps and checkpoints.steps[-1] > num_steps:
          raise ValueError(
            f'num_steps={num_steps}, but workdir={str(workdir)!r} holds a run at step '
            f'{checkpoints.steps[-1]}: choose another workdir to end earlier.'
          )
        if (restored := checkpoints.restore(sharded.state)) is not None:
          start, state, position = restored
          data.set_state(position)
      if state is None:
        state = sharded.init(key)
        if begin is not None:
          # Steps donate their state: whoever gave these arrays keeps his own.
          state = jax.tree.map(jnp.copy, place(begin(state), sharded.state, 'initial state'))
    writer = MetricWriter(workdir if is_primary() else None, start)
    stack.callback(writer.close)
    progress = stack.enter_context(Progress(description, start, num_steps, visible=is_primary()))
    if start >= num_steps:
      progress.say(f'{description}: finished before, at step {start}, in {workdir}')
    elif start:
      progress.say(f'{description}: going on from step {start} in {workdir}')

    def due(step: int) -> bool:
      return bool(evaluate and (step == num_steps or (eval_every and step % eval_every == 0)))

    def judge(step: int, state: TrainState, position: Any) -> dict[str, float]:
      """Evaluates; if an error or a signal ends that, the step is saved, and judged when the run goes on."""
      began = time.perf_counter()
      try:
        with stopping.at_once():
          scores = dict(evaluate(state))
        if best_metric and best_metric not in scores:
          raise ValueError(f'best_metric={best_metric!r} is not in evaluate(): {list(scores)}.')
      except BaseException:
        if checkpoints:
          checkpoints.save(step, state, position)
        raise
      progress.show(step, writer.write(step, scores))
      progress.pause(time.perf_counter() - began)
      return scores

    def revised(step: int, state: TrainState, position: Any) -> TrainState:
      """Revises; if an error or a signal ends that, the step is saved, and revised when the run goes on."""
      began = time.perf_counter()
      try:
        with stopping.at_once():
          given = revise(state)
          new = place(given, sharded.state, 'revised state')
      except BaseException:
        if checkpoints and step:
          checkpoints.save(step, state, position)
        raise
      progress.pause(time.perf_counter() - began)
      # Steps donate their state: an array that stands in it twice, or that others hold, must not be it.
      leaves = zip(*map(jax.tree.leaves, (new, given, state)), strict=True)
      own = [leaf if before is old else jnp.copy(leaf) for leaf, before, old in leaves]
      return jax.tree.unflatten(jax.tree.structure(new), own)

    if start and due(start) and not checkpoints.scores(start):
      checkpoints.save(start, state, position, judge(start, state, position))

    window: list[dict[str, jax.Array]] = []
    ahead = collections.deque(maxlen=_STEPS_AHEAD)
    batches = prefetch_to_device(
      Declared(data, sharded.batch), batch_sharding(mesh), _BATCHES_AHEAD
    )
    for step in range(start + 1, num_steps + 1):
      if step - 1 in revise_at:
        state = revised(step - 1, state, position)
      batch, position = _next(batches, step, num_steps)
      state, metrics = sharded.step(state, frozen, batch)
      window.append(metrics)
      if len(ahead) == _STEPS_AHEAD:
        jax.block_until_ready(ahead[0])
      ahead.append(metrics)
      progress.advance(step)

      last, stop, evaluates = step == num_steps, stopping.after(step), due(step)
      saves = checkpoints and (last or stop or step % checkpoint_every == 0)
      saves = saves or (checkpoints and evaluates and best_metric)
      if saves or evaluates or step % log_every == 0:
        means = _means(window, step, checkpoints)
        window.clear()
        progress.show(step, writer.write(step, {**means, **progress.rate(step)}))
      if saves and stop and not last:
        checkpoints.save(step, state, position)
        checkpoints.wait()
        progress.say(f'{description}: stopped, saved step {step}; the same call goes on from it')
        raise SystemExit(0)
      scores = judge(step, state, position) if evaluates else None
      if saves:
        checkpoints.save(step, state, position, scores)
        writer.flush()
    jax.block_until_ready(state)
    if checkpoints is None and (problem := not_finite(state)):
      raise FloatingPointError(f'{problem} after step {num_steps}.')
    if best_metric:
      checkpoints.wait()
      if checkpoints.best_step is None:
        raise FloatingPointError(
          f'best_metric={best_metric!r} was finite in no evaluation. {checkpoints.last_good()}'
        )
      state = checkpoints.restore(sharded.state, checkpoints.best_step)[1]
  stopping.finish()
  return state, writer.rows


def _next(batches: Iterator[Any], step: int, num_steps: int) -> tuple[Any, Any]:
  try:
    return next(batches)
  except StopIteration:
    raise ValueError(
      f'The data ended before step {step} of num_steps={num_steps}: let it repeat.'
    ) from None


def _means(
  window: list[dict[str, jax.Array]], step: int, checkpoints: Checkpoints | None
) -> dict[str, float]:
  """Fetches the metrics of the steps up to `step` and returns their means."""
  rows = jax.device_get(window)
  for index, row in enumerate(rows):
    if not np.all(np.isfinite(row.get('loss', 0.0))):
      at = step - len(rows) + 1 + index
      good = checkpoints.last_good() if checkpoints else 'Without a workdir nothing was saved.'
      parts = [name for name, own in row.items() if name != 'loss' and not np.all(np.isfinite(own))]
      named = f', with {", ".join(parts)}' if parts else ''
      raise FloatingPointError(f'The loss is {float(row["loss"])} at step {at}{named}. {good}')
  return {name: float(np.mean([row[name] for row in rows], dtype=np.float64)) for name in rows[-1]}
