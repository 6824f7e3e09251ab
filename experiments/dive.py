"""DiVE: Distilling Virtual Examples for Long-tailed Recognition (He, Wu & Wei, ICCV 2021).

A teacher's prediction for a head image supplies small shares of tail classes: virtual examples. Summed over
the training set they form a distribution; where it is flatter than the class counts, distillation helps the
tail. So: a teacher of balanced softmax, flattened by temperature and power, and a student that learns from it
and from the balanced softmax. Claim: far above distillation of a plain teacher under the same budget.

  python -m experiments.dive
  python -m experiments.dive --config=mlcollections_configs/dive/cifar100_lt.py --workdir=DIR
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import launcher
from experiments.long_tail import Trainer, draw_recalls, finish, groups, lower, stage_rows
from experiments.long_tail_data import load_sources, with_features
from experiments.results import row
from jaxlab.losses.distillation import virtual_example_counts

__all__ = ['lower', 'run']


def flatness(virtual: jax.typing.ArrayLike, members: Mapping[str, np.ndarray]) -> float:
  """Returns the mean of the few-shot classes over that of the many-shot ones: 1 is level."""
  virtual = np.asarray(virtual)
  return float(virtual[members['few']].mean() / virtual[members['many']].mean())


def run(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains teachers, students and baselines; measures their recalls and the teachers' virtual examples.

  Metrics `virtual_tau<t>` of `config.virtual.teachers` are `flatness` at temperature t; `virtual_rise` is the
  smallest step between successive temperatures. The row 'class counts' holds what is to be beaten.
  """
  config = with_features(config)
  sources = load_sources(config)
  trainer = Trainer(config, sources, workdir)
  rows, probabilities = stage_rows(trainer, config.runs)
  members = groups(config, sources.counts)
  options, curves = config.virtual, {}
  for name in options.teachers:
    logits = jnp.asarray(trainer.outputs(name, source=sources.train))
    title = config.stages[name].title
    curves[title] = [
      flatness(virtual_example_counts(logits, t), members) for t in options.temperatures
    ]
  level = flatness(sources.counts, members)
  rows.append(row('class counts', 'reference', {}))
  for item in rows:
    curve = curves.get(item['name'])
    if item['name'] == 'class counts':
      curve = [level] * len(options.temperatures)
    if curve is not None:
      named = zip(options.temperatures, curve, strict=True)
      item['metrics'] |= {f'virtual_tau{t:g}': value for t, value in named}
      item['metrics']['virtual_rise'] = float(np.min(np.diff(curve)))
  draw_recalls(trainer, probabilities, workdir / 'recalls.png')
  draw_virtual_examples(config, curves, level, workdir / 'virtual_examples.png')
  return finish(
    config, rows, [*(f'virtual_tau{t:g}' for t in options.temperatures), 'virtual_rise']
  )


def draw_virtual_examples(
  config: ConfigDict, curves: Mapping[str, list[float]], level: float, path: pathlib.Path
) -> None:
  """Draws how level the teachers' virtual examples are, over the temperature."""
  if jax.process_index():
    return
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(6, 3.8))
  for name, curve in curves.items():
    axis.plot(config.virtual.temperatures, curve, marker='o', label=f'teacher: {name}')
  axis.axhline(level, color='gray', linestyle=':', label='class counts')
  axis.set_xlabel('temperature')
  axis.set_ylabel('virtual examples, few over many')
  axis.set_title(f'{config.paper}, {config.setting}, seed {config.seed}')
  axis.legend(frameon=False)
  axis.grid(alpha=0.3)
  figure.tight_layout()
  figure.savefig(str(path), dpi=120)
  plt.close(figure)


if __name__ == '__main__':
  launcher.main(run, 'dive')
