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
from ml_collections import ConfigDict, FrozenConfigDict

from experiments import launcher, supervised, training
from experiments.long_tail import (
  Trainer,
  check,
  draw_recalls,
  finish,
  forward,
  groups,
  lower,
  stage_rows,
)
from experiments.long_tail_data import Sources, load_sources, with_features
from experiments.results import row
from jaxlab import data, parallel
from jaxlab.losses.distillation import flatten_distribution

__all__ = ['lower', 'run']


def flatness(virtual: jax.typing.ArrayLike, members: Mapping[str, np.ndarray]) -> float:
  """Returns the mean of the few-shot classes over that of the many-shot ones: 1 is level."""
  virtual = np.asarray(virtual)
  return float(virtual[members['few']].mean() / virtual[members['many']].mean())


def virtual_examples(trainer: Trainer, name: str) -> np.ndarray:
  """Returns how many virtual examples of each class a teacher sees in the training set.

  The sum of its soft targets at each of `config.virtual.temperatures`, float64 `[temperatures, num_classes]`,
  batch by batch: the logits of all records need not fit anywhere.
  """
  config, source = trainer.config, trainer.sources.train
  model = supervised.classifier(config, supervised.get_stage(config, name))
  variables, section = trainer.variables(name), FrozenConfigDict(config.data)

  @jax.jit
  def sums(variables, batch):
    logits = forward(variables, batch, model=model, section=section)
    own = [flatten_distribution(logits, t) for t in config.virtual.temperatures]
    return jnp.sum(jnp.stack(own) * batch['mask'][:, None], axis=1)

  sharding = parallel.batch_sharding(training.mesh(config))
  index, count = data.process_shard(sharding, config.eval_batch_size)
  total = 0.0
  for batch in data.epoch_batches(
    source,
    config.eval_batch_size,
    process_index=index,
    process_count=count,
    **training.reading(config, 'train'),
  ):
    batch = {field: batch[field] for field in ('image', 'mask')}
    total += np.asarray(sums(variables, data.to_device(batch, sharding)), np.float64)
  return total


def check_virtual(config: ConfigDict, sources: Sources) -> None:
  """Raises ValueError for settings that do not fit together, before anything is trained."""
  temperatures = np.asarray(config.virtual.temperatures)
  if not temperatures.size or temperatures.min() <= 0 or np.any(np.diff(temperatures) <= 0):
    raise ValueError(
      f'virtual.temperatures={config.virtual.temperatures}: expected numbers > 0 in increasing order.'
    )
  check(
    config,
    sources,
    stages={'virtual.teachers': config.virtual.teachers},
    rows=('class counts',),
    metrics=(r'virtual_(rise|tau\d+(\.\d+)?)',),
  )


def run(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains teachers, students and baselines; measures their recalls and the teachers' virtual examples.

  Metrics `virtual_tau<t>` of `config.virtual.teachers` are `flatness` at temperature t; `virtual_rise` is the
  smallest step between successive temperatures. The row 'class counts' holds what is to be beaten. They are
  not measured where there is no many-shot or no few-shot class.
  """
  config = with_features(config)
  sources = load_sources(config)
  check_virtual(config, sources)
  trainer = Trainer(config, sources, workdir)
  rows, probabilities = stage_rows(trainer, config.runs)
  draw_recalls(trainer, probabilities, workdir / 'recalls.png')
  members, temperatures = groups(config, sources.counts), config.virtual.temperatures
  if empty := [name for name in ('many', 'few') if not members[name].any()]:
    training.say(f'virtual examples: not measured, no class has {" or ".join(empty)} images')
    return finish(config, rows)
  curves = {
    config.stages[name].title: [flatness(v, members) for v in virtual_examples(trainer, name)]
    for name in config.virtual.teachers
  }
  level = flatness(sources.counts, members)
  rows.append(row('class counts', 'reference', {}))
  for item in rows:
    curve = curves.get(item['name'])
    if item['name'] == 'class counts':
      curve = [level] * len(temperatures)
    if curve is not None:
      named = zip(temperatures, curve, strict=True)
      item['metrics'] |= {f'virtual_tau{t:g}': value for t, value in named}
      if len(curve) > 1:
        item['metrics']['virtual_rise'] = float(np.min(np.diff(curve)))
  draw_virtual_examples(config, curves, level, workdir / 'virtual_examples.png')
  extra = [*(f'virtual_tau{t:g}' for t in temperatures), 'virtual_rise']
  return finish(config, rows, extra, note='; virtual_*: few over many')


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
