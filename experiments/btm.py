"""BTM: Reviving Undersampling for Long-Tailed Learning (Yu, Du & Wu, arXiv 2401.16811).

Balanced Training and Merging: K balanced subsets of a few images a class are drawn, the network trained on
the long-tailed set is fine-tuned on each, and the K results are averaged into one, parameters and batch
statistics alike. Claim: recalls become far more even, at a mean that is not lower, for any second stage to
start from.

  python -m experiments.btm
  python -m experiments.btm --config=imagenet_lt --workdir=DIR
  python -m experiments.btm --config.features=FILE.npz     # your own features instead of images

The file holds `train_features` [records, dim], `train_labels`, `test_features`, `test_labels`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from experiments.harness import data as harness_data
from experiments.harness import launcher, runs, settings
from experiments.harness.results import row
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Recipe
from experiments.harness.settings import free, section
from experiments.protocols import long_tail, long_tail_data, replicas, stages
from experiments.protocols.long_tail import softmax
from experiments.protocols.long_tail_data import Facts
from experiments.protocols.stages import CLASSIFIER, Beginning, Derived, Stage
from jaxlab import data, models, parallel
from jaxlab.training import average_pytrees, recompute_batch_stats


@dataclasses.dataclass(frozen=True)
class Merging:
  """Balanced fine-tunings and their average.

  Attributes:
    count: fine-tunings, K.
    cap: images a class of a balanced subset.
    recompute_batch_stats: measure the merged network's batch statistics on the training set: the average of
      variances is not the variance of the averaged network.
    vmapped: all fine-tunings at once (records in memory), or one after the other; equal up to rounding.
  """

  count: int = 10
  cap: int = 10
  recompute_batch_stats: bool = False
  vmapped: bool = free(False)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    for name in ('count', 'cap'):
      if getattr(self, name) < 1:
        yield f'{name}={getattr(self, name)}: expected at least 1.'


@dataclasses.dataclass(frozen=True)
class Smoothing:
  """MiSLAS' label-aware smoothing: of the largest and of the smallest class."""

  head: float = 0.3
  tail: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(long_tail.Settings):
  """Settings of BTM.

  Attributes:
    runs: rows among 'stage1' (trained on the long-tailed set), 'balanced' (fine-tunings and their average),
      'crt_stage1', 'crt_merged' (class-balanced classifiers over both networks), 'las_stage1', 'las_merged'
      (MiSLAS' second stage over both).
    network: recipe of the long-tailed training.
    beginning: what it starts from.
    fine_tuning: recipe on balanced subsets.
    merging: balanced subsets and their average.
    crt: recipe of class-balanced classifiers; None: there are none.
    second: recipe of MiSLAS' second stage: label-aware smoothing, class-aware sampling, learnable weight
      scaling.
    smoothing: of its labels.
  """

  runs: tuple[str, ...] = ('stage1', 'balanced', 'las_stage1', 'las_merged')
  network: Recipe
  beginning: Beginning = section(Beginning)
  fine_tuning: Recipe
  merging: Merging = section(Merging)
  crt: Recipe | None = None
  second: Recipe
  smoothing: Smoothing = section(Smoothing)


def table(config: Settings, facts: Facts) -> dict[str, Stage | Derived]:
  """Returns the long-tailed training, fine-tuning, the merged network, second stages over both."""
  stage = functools.partial(long_tail.stage, config, facts)
  beginning, merging = config.beginning, config.merging
  trained = {'frozen': beginning.frozen, 'eval_mode': beginning.eval_mode}
  title = 'CE + mixup' if config.network.mixup else 'CE'
  balanced = {'start': 'stage1', **trained, 'decides': {'cap': merging.cap}}
  found = {
    'stage1': stage(title, 'baseline', config.network, **dataclasses.asdict(beginning)),
    'balanced': dataclasses.replace(
      stage('balanced', 'reference', config.fine_tuning, **balanced),
      size=int(np.minimum(facts.counts, merging.cap).sum()),
    ),
    'merged': Derived('balanced', {'merging': merging}),
  }
  # Batch statistics of MiSLAS' frozen backbone go on adapting, but for those that never did.
  scaled = {
    'head': 'scaled', 'fresh': ('head/scale',), 'frozen': ('backbone/.*',),
    'eval_mode': beginning.eval_mode, 'sampler': 'class_aware',
  }  # fmt: skip
  smoothing = {**dataclasses.asdict(config.smoothing), 'shape': 'concave'}
  for title, start in (('CE', 'stage1'), ('merged', 'merged')):
    if config.crt:
      options = {'start': start, 'sampler': 'class_balanced', **CLASSIFIER}
      found[f'crt_{start}'] = stage(f'{title} + cRT', 'reference', config.crt, **options)
    found[f'las_{start}'] = stage(
      f'{title} + LAS', 'reference', config.second, 'label_aware_smoothing', smoothing,
      start=start, **scaled,
    )  # fmt: skip
  return found


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  facts = long_tail_data.nominal_facts(config.data)
  if problems := list(settings.found_by('smoothing', table, config, facts)):
    yield from problems
    return
  own = table(config, facts)
  yield from long_tail.check(config, own, ['single subset', 'merged'])
  for position, name in enumerate(config.runs):
    if name.endswith('_merged') and 'balanced' not in config.runs[:position]:
      yield f"runs={config.runs}: {name!r} starts from the merged network: name 'balanced' before it."
  if config.merging.vmapped and config.data.imbalance.kind == 'listed':
    yield 'merging.vmapped=True needs records in memory; set it to False.'


def programs(config: Settings, facts: Facts | None = None) -> dict[str, Run]:
  """Returns the trainings by name; 'balanced' is a single fine-tuning, or all of them at once."""
  facts = facts or long_tail_data.nominal_facts(config.data)
  found = stages.programs(config, table(config, facts))
  if 'balanced' in found and config.merging.vmapped:
    single = found['balanced']
    program = replicas.replicate(single.program, config.merging.count)
    found['balanced'] = single._replace(
      program=program, decides={**single.decides, 'count': config.merging.count}
    )
  return found


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains the stages of `config.runs`; the balanced one K times, followed by the merge.

  The row 'single subset' is the average of the K networks' metrics.
  """
  config = long_tail_data.with_features(config)
  sources = long_tail_data.load(config)
  own = table(config, sources.facts)
  settings.require(stages.check(config, own))
  rows = long_tail.Comparison(config, own, sources, workdir)
  for name in config.runs:
    if name != 'balanced':
      rows.add_stages([name])
      continue
    tuned = fine_tune(config, rows)
    scores = [rows.score(softmax(rows.outputs(name, one))) for one in tuned]
    single = {metric: float(np.mean([s[metric] for s in scores])) for metric in scores[0]}
    rows.rows.append(row('single subset', 'reference', single))
    rows.found['merged'] = merge(config, own[name], sources.train, tuned)
    rows.add('merged', 'method', softmax(rows.outputs('merged')))
  return rows.finish()


def fine_tune(config: Settings, rows: long_tail.Comparison) -> list[Variables]:
  """Returns the variables of K fine-tunings, each on a balanced subset of its own.

  One program, compiled once: run after run, or all at once.
  """
  begin = functools.partial(runs.take_over, start=rows.variables('stage1'))
  training = programs(config, rows.sources.facts)['balanced']
  subsets, key = balanced_subsets(config, rows.sources.train), jax.random.key(config.seed)
  if config.merging.vmapped:
    folder, begin = rows.workdir / 'balanced', jax.vmap(begin)
    together = runs.train(training, data.Aligned(subsets), folder, begin=begin).variables
    return [jax.tree.map(lambda leaf, k=k: leaf[k], together) for k in range(len(subsets))]
  return [
    runs.train(
      training,
      source,
      rows.workdir / f'balanced_{k}',
      key=replicas.run_key(key, k),
      begin=begin,
    ).variables
    for k, source in enumerate(subsets)
  ]


def balanced_subsets(config: Settings, train: data.Source) -> list[data.Source]:
  """Returns K independent subsets with at most `cap` records a class, in random order."""
  rng, labels = np.random.default_rng((config.seed, 1)), data.source_labels(train)
  own = config.merging
  drawn = data.balanced_subsets(rng, labels, own.cap, own.count, config.data.num_classes)
  return [data.subset(train, rng.permutation(indices)) for indices in drawn]


def merge(
  config: Settings, stage: Stage, train: data.Source, tuned: Sequence[Variables]
) -> Variables:
  """Returns the average of all variables, batch statistics included, or measured anew."""
  merged = average_pytrees(tuned)
  if not (config.merging.recompute_batch_stats and merged.get('batch_stats')):
    return merged
  batches = training_inputs(config, stage, train)
  hooks = models.eval_mode_hooks(stage.eval_mode)
  model = stages.classifier(config, stage)
  return recompute_batch_stats(model, merged, batches, hooks=hooks, keep=stage.eval_mode)


def training_inputs(config: Settings, stage: Stage, source: data.Source) -> Iterator[jax.Array]:
  """Yields the network's inputs of one epoch of the long-tailed set, augmented as in training."""
  sharding, task = parallel.batch_sharding(config.mesh.make()), config.task
  size, key = stage.recipe.batch_size, jax.random.key(config.seed)
  loader = harness_data.loader(
    config.data, source, size, mesh=config.mesh, seed=config.seed, num_epochs=1
  )
  prepare = jax.jit(lambda batch: task.augmented(data.example_keys(key, 0, batch['index']), batch))
  try:
    for batch in loader:
      yield prepare(data.to_device({k: batch[k] for k in ('image', 'index')}, sharding))
  finally:
    loader.close()


if __name__ == '__main__':
  launcher.main('btm')
