"""Methods that are fitted on several draws of a few-shot set, all at once, and compared over them."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import pictures
from experiments.harness.runs import Call, say
from experiments.protocols.frozen_features import Facts, Settings, Task
from jaxlab import parallel

Array = jax.Array
PyTree = Any
Row = Mapping[str, Any]

# A row's colors: of what is measured first, and of the rest.
COLORS = {
  'reference': ('#4d9f70', '#a9d1b8'), 'baseline': ('#9aa5b1', '#d3d9df'), 'method': ('#2563eb', '#93b4f5'),
}  # fmt: skip


class Methods(NamedTuple):
  """What is compared: pure functions on one draw, whose first argument is the mesh.

  Attributes:
    fits: by name, `(mesh, key, features, labels) -> fitted`.
    judge: `(mesh, key, (features, labels), (test features, test labels), {name: fitted}) -> metrics`.
  """

  fits: Mapping[str, Callable[..., PyTree]]
  judge: Callable[..., dict[str, Array]]


class Solved(NamedTuple):
  """What comes out of a task, on the host; arrays have an axis of draws in front.

  Attributes:
    fitted: by the names of `Methods.fits`.
    metrics: those of `Methods.judge`.
    seconds: of each compiled fit, of all draws together; the least of three where it takes less than one.
  """

  fitted: dict[str, PyTree]
  metrics: dict[str, np.ndarray]
  seconds: dict[str, float]


def programs(config: Settings, facts: Facts, methods: Methods) -> dict[str, Call]:
  """Returns what is compiled for tasks of some sizes: every fit on all draws, and `judge`."""

  def arguments(mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
    """Returns the shapes of keys, of features and labels of all draws, and of those of the test."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), config.draws))
    train = _shapes((config.draws, facts.examples), facts.dim)
    test = _shapes((facts.test_examples,), facts.dim)
    return parallel.abstract((keys, train, test), parallel.replicated(mesh))

  def fitting(fit: Callable[..., PyTree], mesh: jax.sharding.Mesh) -> tuple[Any, tuple[Any, ...]]:
    keys, train, _ = arguments(mesh)
    return _on_draws(functools.partial(fit, mesh), 0, mesh), (keys, *train)

  def judging(mesh: jax.sharding.Mesh) -> tuple[Any, tuple[Any, ...]]:
    fitted = {}
    for name, fit in methods.fits.items():
      function, given = fitting(fit, mesh)
      fitted[name] = parallel.abstract(jax.eval_shape(function, *given), parallel.replicated(mesh))
    judge = _on_draws(functools.partial(methods.judge, mesh), (0, 0, None, 0), mesh)
    return judge, (*arguments(mesh), fitted)

  found = {name: Call(functools.partial(fitting, fit)) for name, fit in methods.fits.items()}
  return found | {'judge': Call(judging)}


def solve(config: Settings, methods: Methods, task: Task, key: Array) -> Solved:
  """Fits every method on all draws of a task, by the programs of `programs`, judges them, and says it."""
  mesh, own = config.mesh.make(), programs(config, task.facts, methods)

  def split(key: Array) -> list[Array]:
    both = jax.random.split(key, len(methods.fits) + 1)
    return [jax.random.split(k, config.draws) for k in both]

  # On all devices from the start: keys cannot be put onto those of other processes.
  *keys, judge_key = jax.jit(split, out_shardings=parallel.replicated(mesh))(key)
  train, test = (task.features, task.labels), (task.test_features, task.test_labels)
  fitted, seconds = {}, {}
  for name, fit_key in zip(methods.fits, keys, strict=True):
    fitted[name], seconds[name] = _timed(own[name], mesh, fit_key, train)
  metrics, _ = _timed(own['judge'], mesh, judge_key, (train, test, fitted), repeats=1)
  means = [f'{name} {jnp.mean(values):.3f}' for name, values in metrics.items()]
  means += [f'{name} {value:.2g} s' for name, value in seconds.items()]
  sizes = f'{config.draws} draws of {task.facts.examples}, {task.facts.dim} channels'
  say(f'{task.name} ({sizes}): {", ".join(means)}')
  return Solved(jax.device_get(fitted), jax.device_get(metrics), seconds)


def spread(name: str, values: np.ndarray) -> dict[str, float]:
  """Returns mean and population deviation over draws, under `name` and `name_std`."""
  return {name: values.mean(), f'{name}_std': values.std()}


def draw_bars(axis: Any, config: Settings, rows: Sequence[Row], metrics: Mapping[str, str]) -> None:
  """Draws metrics, given with their titles, of the rows `config.pictured` (default: no references)."""
  shown = [
    row for row in rows
    if (row['name'] in config.pictured if config.pictured else row['role'] != 'reference')
  ]  # fmt: skip
  bars = [(row, i, metric) for i, metric in enumerate(metrics) for row in shown]
  places, width = np.arange(len(config.task_names)), 0.8 / max(len(bars), 1)
  for position, (row, i, metric) in enumerate(bars):
    names = [f'{task}_{metric}' for task in config.task_names]
    axis.bar(
      places + (position + 0.5) * width - 0.4,
      [row['metrics'].get(name, np.nan) for name in names],
      width,
      yerr=[row['metrics'].get(f'{name}_std', np.nan) for name in names],
      color=COLORS[row['role']][min(i, 1)],
      hatch='//' if i else '',
      capsize=2,
      label=f'{row["name"]}, {metrics[metric]}',
    )
  axis.set_xticks(places, config.task_names, fontsize=8)
  axis.set_ylabel('accuracy (%)')
  axis.set_title(pictures.title(config))
  axis.set_ylim(0, 115)
  axis.legend(frameon=False, fontsize=8, ncol=2, loc='upper left')
  axis.grid(alpha=0.3, axis='y')


def _shapes(records: tuple[int, ...], dim: int) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Returns the shapes of features and labels."""
  features = jax.ShapeDtypeStruct((*records, dim), jnp.float32)
  return features, jax.ShapeDtypeStruct(records, jnp.int32)


def _on_draws(
  function: Callable[..., PyTree], axes: Any, mesh: jax.sharding.Mesh
) -> Callable[..., PyTree]:
  """Returns `function` over the axis of draws of its arguments; all of the result is on every device."""

  def run(*arguments: Any) -> PyTree:
    out = jax.vmap(function, axes)(*arguments)
    return jax.lax.with_sharding_constraint(out, parallel.replicated(mesh))

  return run


def _timed(
  call: Call, mesh: jax.sharding.Mesh, keys: Array, values: tuple[Any, ...], repeats: int = 3
) -> tuple[PyTree, float]:
  """Returns what a program makes of keys and `values`, and its seconds, see `Solved`."""
  function, shapes = call.make(mesh)
  compiled = jax.jit(function).lower(*shapes).compile()
  values, seconds = parallel.place(values, shapes[1:]), []
  while not seconds or (len(seconds) < repeats and seconds[0] < 1):
    began = time.perf_counter()
    out = jax.block_until_ready(compiled(keys, *values))
    seconds.append(time.perf_counter() - began)
  return out, min(seconds)
