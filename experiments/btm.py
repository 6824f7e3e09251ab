"""BTM: Reviving Undersampling for Long-Tailed Learning (Yu, Du & Wu, arXiv 2401.16811).

Balanced Training and Merging: K balanced subsets of a few images a class are drawn, the network trained on
the long-tailed set is fine-tuned on each, and the K results are averaged into one, parameters and batch
statistics alike. Claim: recalls become far more even, at a mean that is not lower, for any second stage to
start from.

  python -m experiments.btm
  python -m experiments.btm --config.features=FILE.npz     # your own features instead of images

The file holds `train_features` [records, dim], `train_labels`, `test_features`, `test_labels`.
"""

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from experiments import launcher, supervised, training
from experiments.long_tail import Trainer, check, draw_recalls, finish, lower, softmax, stage_rows
from experiments.long_tail_data import Sources, load_sources, with_features
from experiments.results import row
from jaxlab import data, models, parallel
from jaxlab.data import long_tail
from jaxlab.training.averaging import average_pytrees, running_average

PyTree = Any
Variables = dict[str, PyTree]

__all__ = ['lower', 'run']


def run(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains the stages of `config.runs`; the balanced one K times, followed by the merge.

  The row 'single subset' is the average of the K networks' metrics.
  """
  config = with_features(config)
  sources = load_sources(config)
  check_merge(config, sources)
  trainer = Trainer(config, sources, workdir)
  rows, probabilities = [], {}
  for name in config.runs:
    if name != config.merged.of:
      found, predicted = stage_rows(trainer, [name])
      rows += found
      probabilities |= predicted
      continue
    tuned = fine_tune(trainer)
    scores = [trainer.score(softmax(trainer.outputs(name, one))) for one in tuned]
    single = {metric: float(np.mean([s[metric] for s in scores])) for metric in scores[0]}
    rows.append(row('single subset', 'reference', single))
    trainer.found['merged'] = merged = merge(trainer, tuned)
    probabilities['merged'] = softmax(trainer.outputs(name, merged))
    rows.append(row('merged', 'method', trainer.score(probabilities['merged'])))
  draw_recalls(trainer, probabilities, workdir / 'recalls.png')
  return finish(config, rows)


def check_merge(config: ConfigDict, sources: Sources) -> None:
  """Raises ValueError for settings that do not fit together, before anything is trained."""
  options = config.merged
  if options.count < 1:
    raise ValueError(f'merged.count={options.count}: expected at least one fine-tuning.')
  if options.of not in config.stages:
    raise ValueError(
      f'merged.of={options.of!r}: there is no such stage; stages: {", ".join(config.stages)}.'
    )
  if supervised.get_stage(config, options.of).cap is None:
    raise ValueError(f'stages.{options.of}.cap=None: expected the images a class of a subset.')
  if options.vmapped and options.of in config.runs:
    require_memory(sources.train)
  check(config, sources, rows=('single subset', 'merged'))
  for position, name in enumerate(config.runs):
    if options.of not in config.runs[:position] and needs_merge(config, name):
      raise ValueError(
        f'runs={tuple(config.runs)}: {name!r} starts from the merged network: name {options.of!r} before it.'
      )


def needs_merge(config: ConfigDict, name: str | None) -> bool:
  """Returns whether a stage builds on the merged network, itself or through others."""
  if not name or name == 'merged':
    return bool(name)
  stage = config.stages[name]
  return needs_merge(config, stage.start) or needs_merge(config, stage.teacher)


def require_memory(*sources: data.Source) -> None:
  """Raises ValueError for sources whose records are read one by one."""
  if not all(isinstance(source, data.InMemory) for source in sources):
    raise ValueError('merged.vmapped=True needs records in memory; set it to False.')


def fine_tune(trainer: Trainer) -> list[Variables]:
  """Returns the variables of K fine-tunings, each on a balanced subset of its own.

  One program, compiled once: run after run, or with `merged.vmapped` all at once (records in memory). Both
  give the same variables up to rounding.
  """
  config, options = trainer.config, trainer.config.merged
  name, count = options.of, options.count
  single, begin = trainer.program(name), trainer.beginning(name)
  subsets, key = balanced_sources(trainer), jax.random.key(config.seed)
  if options.vmapped:
    state = trainer.fit(
      name,
      supervised.replicate(single, count),
      Aligned(subsets),
      begin=begin and jax.vmap(begin),
      count=count,
    )
    together = {'params': state.params, **state.model_state}
    return [jax.tree.map(lambda leaf: leaf[run], together) for run in range(count)]  # noqa: B023
  found = []
  for run, source in enumerate(subsets):
    own = supervised.run_key(key, run)
    state = trainer.fit(name, single, source, folder=f'{name}_{run}', key=own, begin=begin)
    found.append({'params': state.params, **state.model_state})
  return found


def balanced_sources(trainer: Trainer) -> list[data.Source]:
  """Returns K independent subsets with at most `cap` records a class, in random order."""
  config, train = trainer.config, trainer.sources.train
  cap = supervised.get_stage(config, config.merged.of).cap
  rng = np.random.default_rng((config.seed, 1))
  drawn = long_tail.balanced_subsets(
    rng, long_tail.source_labels(train), cap, config.merged.count, config.data.num_classes
  )
  return [long_tail.subset(train, rng.permutation(indices)) for indices in drawn]


class Aligned:
  """Sources in memory of one length, side by side: a batch has the sources on its second axis."""

  def __init__(self, sources: Sequence[data.Source]):
    require_memory(*sources)
    self._sources = sources
    self.num_classes, self.class_names = sources[0].num_classes, sources[0].class_names

  def __len__(self) -> int:
    return len(self._sources[0])

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {name: rows[0] for name, rows in self.gather(np.array([index])).items()}

  def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns a batch, `[records, sources, ...]`."""
    batches = [source.gather(indices) for source in self._sources]
    return {name: np.stack([batch[name] for batch in batches], 1) for name in batches[0]}


def merge(trainer: Trainer, tuned: Sequence[Variables]) -> Variables:
  """Returns the average of all variables, batch statistics included.

  With `merged.recompute_batch_stats` the merged network's statistics are measured on the training set: the
  average of variances is not the variance of the averaged network.
  """
  config, options = trainer.config, trainer.config.merged
  merged = average_pytrees(tuned)
  if not (options.recompute_batch_stats and merged.get('batch_stats')):
    return merged
  stage = supervised.get_stage(config, options.of)
  model = supervised.classifier(config, stage)
  batches = training_batches(trainer, stage)
  return recompute_batch_stats(model, merged, batches, tuple(stage.eval_mode))


def training_batches(trainer: Trainer, stage: ConfigDict) -> Iterable[jax.Array]:
  """Yields the network's inputs of one epoch of the long-tailed set, augmented as in training."""
  config, mesh = trainer.config, training.mesh(trainer.config)
  sharding = parallel.batch_sharding(mesh)
  loader = training.make_loader(config, trainer.sources.train, stage.batch_size, num_epochs=1)
  key = jax.random.key(config.seed)

  @jax.jit
  def prepare(batch):
    keys = data.example_keys(key, 0, batch['index'])
    return supervised.augmented(config, keys, batch['image'])

  try:
    for batch in loader:
      yield prepare(data.to_device({k: batch[k] for k in ('image', 'index')}, sharding))
  finally:
    loader.close()


def recompute_batch_stats(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Iterable[jax.Array],
  eval_mode: Sequence[str] = (),
) -> Variables:
  """Returns the variables with running statistics that are the plain mean of those of the batches.

  A batch norm moves its statistics by `new = m old + (1 - m) batch`. From `old` 0 and 1 follow `m` and the
  batch's own, whatever momentum the network has. Modules that match a pattern of `eval_mode` use and keep
  the statistics that they have.
  """
  hooks = supervised.eval_mode_hooks(eval_mode)
  stats = traverse_util.flatten_dict(variables['batch_stats'], sep='/')

  def stays(path: str) -> bool:
    parts = path.split('/')
    modules = ['/'.join(parts[:depth]) for depth in range(1, len(parts))]
    return any(re.fullmatch(pattern, module) for pattern in eval_mode for module in modules)

  kept = {path: leaf for path, leaf in stats.items() if stays(path)}

  @jax.jit
  def measure(images):
    def moved(old):
      own = {path: jnp.full_like(leaf, old) for path, leaf in stats.items()} | kept
      given = {**variables, 'batch_stats': traverse_util.unflatten_dict(own, sep='/')}
      _, new = models.apply(model, given, images, train=True, mutable=['batch_stats'], hooks=hooks)
      return traverse_util.flatten_dict(new['batch_stats'], sep='/')

    return jax.tree.map(lambda zero, one: zero / (1 - (one - zero)), moved(0.0), moved(1.0))

  average = None
  for count, images in enumerate(batches):
    found = measure(images)
    average = found if average is None else running_average(average, found, count)
  return {**variables, 'batch_stats': traverse_util.unflatten_dict(average | kept, sep='/')}


if __name__ == '__main__':
  launcher.main(run, 'btm')
