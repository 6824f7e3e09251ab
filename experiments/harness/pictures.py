"""Pictures of results."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.harness.sections import Experiment


@contextlib.contextmanager
def drawn(path: Any, *shape: int, size: tuple[float, float], **options: Any) -> Iterator[Any]:
  """Yields the axes of a picture (one, or an array for a `shape`) that is saved to `path` afterwards.

  In other processes than the first nothing is saved.
  """
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(*shape, figsize=size, **options)
  try:
    yield axes
    figure.tight_layout()
    if jax.process_index() == 0:
      figure.savefig(str(path), dpi=120)
  finally:
    plt.close(figure)


def bars(
  path: Any,
  config: Experiment,
  rows: Sequence[Mapping[str, Any]],
  panels: Mapping[str, Mapping[str, str]],
) -> None:
  """Draws metrics of rows as bars, side by side in panels.

  Args:
    path: of the picture.
    config: the experiment; its `pictured` rows are drawn.
    rows: see `results.row`; one that lacks a metric has no bar.
    panels: by title, in each the metrics by what the legend calls them.
  """
  rows = [item for item in rows if not config.pictured or item['name'] in config.pictured]
  places = np.arange(len(rows))
  with drawn(path, 1, len(panels), size=(4.5 * len(panels), 3.8), squeeze=False) as axes:
    for axis, (name, series) in zip(axes[0], panels.items(), strict=True):
      values = [
        [item['metrics'].get(metric, np.nan) for item in rows] for metric in series.values()
      ]
      width = 0.8 / len(series)
      for index, (label, own) in enumerate(zip(series, values, strict=True)):
        axis.barh(places + index * width, own, width, label=label)
      if np.any(np.isfinite(values)):
        axis.set_xlim(max(0, np.nanmin(values) - 5), np.nanmax(values) + 2)
      axis.set_yticks(places + 0.4 - width / 2, [item['name'] for item in rows], fontsize=7)
      axis.invert_yaxis()
      axis.set_xlabel(name)
      axis.grid(alpha=0.3, axis='x')
    if max(map(len, panels.values())) > 1:
      axes[0, -1].legend(frameon=False, fontsize=8)
    axes[0, 0].figure.suptitle(title(config))


def retrieved(
  path: Any,
  queries: np.ndarray,
  found: np.ndarray,
  right: np.ndarray,
  there: np.ndarray | None = None,
) -> None:
  """Draws queries, each with the images that it retrieves, framed green where they are right, else red.

  Args:
    path: of the picture.
    queries: images `[rows, height, width, channels]`.
    found: images `[rows, count, height, width, channels]`.
    right: bool `[rows, count]`.
    there: likewise, which of the places hold an image; None: all.
  """
  rows, count = found.shape[:2]
  with drawn(path, rows, count + 1, size=(1.1 * (count + 1), 1.1 * rows), squeeze=False) as axes:
    for axis in axes.flat:
      axis.set_xticks([])
      axis.set_yticks([])
    for row, column in np.ndindex(rows, count):
      if there is not None and not there[row, column]:
        continue
      axes[row, column + 1].imshow(np.squeeze(found[row, column]), cmap='gray')
      for spine in axes[row, column + 1].spines.values():
        spine.set(color='tab:green' if right[row, column] else 'tab:red', linewidth=2)
    for axis, image in zip(axes[:, 0], queries, strict=True):
      axis.imshow(np.squeeze(image), cmap='gray')
    axes[0, 0].set_title('query', fontsize=8)
    axes[0, 1].set_title('retrieved', fontsize=8)


def curves(
  path: Any,
  config: Experiment,
  histories: Mapping[str, Sequence[Mapping[str, float]]],
  labels: Mapping[str, str],
) -> None:
  """Draws metrics over the steps of trainings, a panel a metric and a line a training.

  Metrics that no training has are left out; where there is none, nothing is drawn.

  Args:
    path: of the picture.
    config: the experiment.
    histories: rows of metrics with their `step`, by the title of the training.
    labels: of the vertical axes, by metric.
  """
  lines = [line for history in histories.values() for line in history]
  shown = [metric for metric in labels if any(metric in line for line in lines)]
  if not shown:
    return
  with drawn(path, 1, len(shown), size=(4.3 * len(shown), 4), squeeze=False) as ((*axes,),):
    for axis, metric in zip(axes, shown, strict=True):
      for name, history in histories.items():
        points = [(line['step'], line[metric]) for line in history if metric in line]
        if points:
          axis.plot(*zip(*points, strict=True), label=name)
      axis.set(xlabel='step', ylabel=labels[metric])
    axes[0].legend(frameon=False, fontsize=7)
    axes[0].figure.suptitle(title(config))


def title(config: Experiment) -> str:
  """Returns what stands above an experiment's tables and pictures."""
  return f'{config.paper}, {config.setting}, seed {config.seed}'
