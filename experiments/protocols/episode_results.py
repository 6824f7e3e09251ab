"""Results of few-shot episodes: kept in files from which an interrupted run goes on, and compared."""

import functools
import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from numpy.typing import ArrayLike

from experiments.harness import pictures, results
from experiments.harness.runs import Variables, say
from experiments.harness.settings import identity
from experiments.protocols import episodes
from experiments.protocols.episode_settings import Settings
from experiments.protocols.episodes import BATCH_AXES, Method, Pools
from experiments.protocols.few_shot_data import Sources
from jaxlab.evaluation import episode_metrics, predicted_classes
from jaxlab.training.checkpoints import config_difference

PyTree = Any
Results = dict[str, np.ndarray]

METRICS = (
  'acc_mean', 'std', 'mean_minus_3std', 'acc_1', 'acc_10', 'acc_100', 'ci95_half_width',
  'cosine', 'drift',
)  # fmt: skip


class Comparison:
  """Fine-tunes one pre-trained network on the same episodes in several ways, and collects the rows.

  Attributes:
    config: the experiment.
    methods: what is done in an episode, by name.
    sources: its data; of novel images those that occur in an episode.
    drawn: the episodes.
    workdir: of the experiment.
    rows: of the table so far.
    accuracies: of the episodes, `[episodes]`, by row.
  """

  def __init__(
    self, config: Settings, methods: Mapping[str, Method], sources: Sources, workdir: Any
  ):
    """Draws the episodes: those that cannot be are refused before anything is trained."""
    novel, self.drawn = episodes.draw(config, sources.novel)
    self.config, self.methods, self.workdir = config, methods, workdir
    self.sources = sources._replace(novel=novel)
    self.rows: list[dict[str, Any]] = []
    self.accuracies: dict[str, np.ndarray] = {}
    self._compiled: dict[str, Callable[..., dict[str, jax.Array]]] = {}

  @functools.cached_property
  def given(self) -> tuple[Variables, Pools]:
    """What all episodes read: the pre-trained network, and the pools."""
    variables = episodes.pretrained(self.config, self.sources.base, self.workdir / 'backbone')
    return variables, episodes.make_pools(self.config, variables, self.sources)

  def fine_tune(
    self,
    title: str,
    name: str,
    numbers: Mapping[str, float],
    *,
    member: int = 0,
    rows: tuple[int, int] | None = None,
  ) -> Results:
    """Returns `episodes.fine_tune` of all episodes, from wherever their file was left.

    Args:
      title: of the file, and on the screen.
      name: of the method.
      numbers: for its loss.
      member: of an ensemble.
      rows: base images that are drawn from; None: all.
    """
    method, rows = self.methods[name], (0, self.config.num_base) if rows is None else rows
    if name not in self._compiled:
      function, _ = episodes.program(self.config, method).make(self.config.mesh.make())
      self._compiled[name] = jax.jit(function)
    tasks = episodes.tasks(self.drawn, rows, member, numbers)
    folder = self.workdir / 'episodes'
    folder.mkdir(exist_ok=True)
    file = folder / f'{title.replace(", ", "_").replace(" ", "_")}.npz'
    decides = {**method.decides, **numbers, 'method': name, 'member': member, 'rows': rows}

    def compute(tasks: PyTree) -> dict[str, jax.Array]:  # asks for a network only if it is needed
      return self._compiled[name](*self.given, tasks)

    return run_tasks(self.config, compute, tasks, file, title, decides)

  def measure(self, probabilities: np.ndarray, cosines: ArrayLike) -> dict[str, float]:
    """Returns the metrics of a row, accuracies in percent, the mean cosine, and `drift`, 1 - cosine."""
    metrics, cosine = episode_metrics(self.judge(probabilities)), float(np.mean(cosines))
    found = {name: 100 * value for name, value in metrics.items()}
    return found | {'cosine': cosine, 'drift': 1 - cosine}

  def judge(self, probabilities: np.ndarray) -> np.ndarray:
    """Returns the accuracies `[episodes]` of probabilities `[episodes, queries, num_ways]`.

    Raises:
      ValueError: if a probability is NaN.
    """
    predictions = np.asarray(predicted_classes(probabilities))
    return np.mean(predictions == self.drawn.query_labels, axis=-1)

  def add(self, name: str, role: str, probabilities: np.ndarray, cosines: ArrayLike) -> None:
    """Adds the row of some predicted probabilities, and of `fine_tune`'s cosines."""
    self.accuracies[name] = self.judge(probabilities)
    self.rows.append(results.row(name, role, self.measure(probabilities, cosines)))

  def add_mean(self, name: str, role: str, found: Sequence[Results]) -> None:
    """Adds a row with the means of the metrics of several networks."""
    each = [self.measure(item['probabilities'], item['cosine']) for item in found]
    mean = {metric: float(np.mean([item[metric] for item in each])) for metric in each[0]}
    self.rows.append(results.row(name, role, mean))

  def finish(self, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Draws the accuracies, and returns the results, whose table has `extra` metrics behind the others."""
    names = self.config.pictured or tuple(self.accuracies)
    shown = {name: self.accuracies[name] for name in names if name in self.accuracies}
    draw(self.config, shown or self.accuracies, self.workdir / 'episode_accuracies.png')
    return results.results(self.config, self.rows, [*METRICS, *extra], 'accuracies in %')


def run_tasks(
  config: Settings,
  compute: Callable[[PyTree], dict[str, jax.Array]],
  tasks: PyTree,
  file: Any,
  title: str,
  decides: Mapping[str, Any],
) -> Results:
  """Returns what `compute` gives for all tasks; what `file` already holds of them is not done again.

  The file grows by `episodes.per_call` tasks at a time. One that cannot be read is written anew, after a
  warning. `decides`: what the results depend on besides the settings of episodes.

  Raises:
    ValueError: if it holds episodes of other settings.
  """
  settings, mesh = fingerprint(config, decides), config.mesh.make()
  count = len(tasks['episode'])
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  chunk = -(-min(config.episodes.per_call, count) // parts) * parts
  done = read_done(file, settings)
  for first in range(len(done.get('cosine', ())), count, chunk):
    rows = np.minimum(np.arange(first, first + chunk), count - 1)  # the last call is filled up
    batch = jax.tree.map(lambda values, rows=rows: values[rows], tasks)
    out = compute(jax.device_put(batch, NamedSharding(mesh, BATCH_AXES)))
    if jax.process_count() > 1:
      out = multihost_utils.process_allgather(out, tiled=True)
    new = {name: np.asarray(value)[: count - first] for name, value in out.items()}
    done = {name: np.concatenate([done[name], v]) if done else v for name, v in new.items()}
    if jax.process_index() == 0:
      partial = file.parent / f'{file.name}.partial'
      with partial.open('wb') as stream:
        np.savez(stream, settings=settings, **done)
      partial.replace(file)
    say(f'{title}: {min(first + chunk, count)} of {count} episodes')
  return done


def read_done(file: Any, settings: str) -> Results:
  """Returns the results that a file of `run_tasks` holds, nothing if there is no file that can be read."""
  if not file.exists():
    return {}
  try:
    with file.open('rb') as stream:
      held = dict(np.load(stream, allow_pickle=False))
    there = json.loads(held.pop('settings').item())
  except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
    warnings.warn(f'{file} cannot be read ({error}) and is written anew.', stacklevel=3)
    return {}
  if lines := config_difference(there, json.loads(settings)):
    raise ValueError(
      f'{file} holds episodes of other settings:\n  '
      + '\n  '.join(lines)
      + '\nUse another workdir, or the settings it was started with.'
    )
  return held


def fingerprint(config: Settings, decides: Mapping[str, Any]) -> str:
  """Returns what decides the results of episodes, as text."""
  weights = 'checkpoint' if config.checkpoint else 'recipe'
  names = ('seed', 'data', 'model', 'augment', weights, 'episodes', 'fine_tuning', 'base')
  own = identity({**{name: getattr(config, name) for name in names}, **decides})
  return json.dumps(own, sort_keys=True)


def draw(config: Settings, accuracies: Mapping[str, np.ndarray], path: Any) -> None:
  """Draws the histogram of episode accuracies of every row, the ten lowest marked."""
  bins = accuracy_bins(config.episodes.num_ways * config.episodes.num_queries)
  seen = 100 * np.concatenate(list(accuracies.values()))
  options = {'size': (8, 1.9 * len(accuracies) + 0.6), 'sharex': True, 'sharey': True}
  with pictures.drawn(path, len(accuracies), 1, squeeze=False, **options) as axes:
    for axis, (name, values) in zip(axes[:, 0], accuracies.items(), strict=True):
      percent = np.sort(100 * values)
      worst, rest = percent[:10], percent[10:]
      axis.hist([worst, rest], bins, stacked=True, color=['#dc2626', '#9aa5b1'])
      mean, proxy = percent.mean(), percent.mean() - 3 * percent.std()
      axis.axvline(mean, color='#2563eb', label=f'mean {mean:.1f}')
      axis.axvline(proxy, color='#2563eb', linestyle=':', label=f'mean - 3 sigma {proxy:.1f}')
      axis.plot([], [], 's', color='#dc2626', label=f'10 worst: {worst.mean():.1f}')
      axis.set_title(name, loc='left', fontsize=10)
      axis.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
    axes[-1, 0].set_xlim(max(seen.min() - 20, 0), min(seen.max() + 8, 100))
    axes[-1, 0].set_xlabel('accuracy of an episode (%)')
    axes[0, 0].figure.suptitle(pictures.title(config))


def accuracy_bins(queries: int) -> np.ndarray:
  """Returns edges of a histogram, in percent: two of the possible accuracies in each bin, 0 to 100 %.

  >>> accuracy_bins(4)
  array([-12.5,  37.5,  87.5, 137.5])
  """
  return 100 * (np.arange(0, queries + 3, 2) - 0.5) / queries
