"""Pictures of results."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

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


def title(config: Experiment) -> str:
  """Returns what stands above an experiment's tables and pictures."""
  return f'{config.paper}, {config.setting}, seed {config.seed}'
