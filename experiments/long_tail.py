"""What the long-tail experiments share: data, stages trained in order, rows of recalls, pictures.

The training set is long-tailed and the test set balanced. Stages (`experiments.supervised`) are trained when
somebody asks for their variables, those they start from or learn from first; each keeps its run in
`<workdir>/<stage>`.
"""

import functools
import hashlib
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from experiments import results, supervised, training
from experiments.long_tail_data import Sources
from jaxlab import data, evaluation, models, parallel
from jaxlab.data import long_tail, samplers
from jaxlab.evaluation.calibration import expected_calibration_error
from jaxlab.evaluation.recalls import recall_metrics
from jaxlab.training import Checkpoints, Program, TrainState, fit, map_batches

PyTree = Any
METRICS = ('mean', 'harmonic', 'geometric', 'lowest', 'many', 'medium', 'few', 'ece')


class Trainer:
  """Trains the stages of a configuration when they are asked for, each once."""

  def __init__(self, config: ConfigDict, sources: Sources, workdir: pathlib.Path):
    self.config, self.sources, self.workdir = config, sources, workdir
    self.found: dict[str, dict[str, PyTree]] = {}

  def variables(self, name: str) -> dict[str, PyTree]:
    """Returns the variables that stage `name` ends with."""
    if name not in self.found:
      own = supervised.get_stage(self.config, name)
      begin = self.beginning(name)
      state = self.fit(name, self.program(name), self.records(own), begin=begin)
      self.found[name] = {'params': state.params, **state.model_state}
    return self.found[name]

  def program(self, name: str) -> Program:
    """Returns the program of a stage for the counts of the data."""
    return supervised.program(self.config, name, self.sources.counts)

  def beginning(self, name: str) -> Callable[[TrainState], TrainState] | None:
    """Returns what puts other stages' variables into a drawn state; None if the stage builds on none."""
    own = supervised.get_stage(self.config, name)
    start = self.variables(own.start) if own.start else None
    if own.pretrained:
      _, public = models.load_pretrained(own.pretrained, num_classes=None)
      start = {collection: {'backbone': tree} for collection, tree in public.items()}
    teacher = self.variables(own.teacher) if own.teacher else None
    if start is None and teacher is None:
      return None
    return functools.partial(
      supervised.take_over, start=start, fresh=tuple(own.fresh), teacher=teacher
    )

  def records(self, stage: ConfigDict, held_out: bool = False) -> data.Source:
    """Returns the training records of a stage, or those that its hold-out leaves out."""
    if not stage.holdout:
      return self.sources.train
    labels = long_tail.source_labels(self.sources.train)
    taken = supervised.held_out(self.sources.counts, stage.holdout)
    out = long_tail.select_imbalanced(labels, taken, self.config.seed)
    kept = np.setdiff1d(np.arange(len(labels)), out)
    return long_tail.subset(self.sources.train, out if held_out else kept)

  def fit(
    self,
    name: str,
    program: Program,
    source: data.Source,
    *,
    folder: str | None = None,
    key: jax.Array | None = None,
    begin: Callable[[TrainState], TrainState] | None = None,
    **settings: Any,
  ) -> TrainState:
    """Returns the final state of a stage's run in `<workdir>/<folder>`, from wherever it was left.

    Args:
      name: of the stage.
      program: the stage's, or several of its runs at once.
      source: training records.
      folder: default: the stage's name.
      key: of the drawn values; default: the seed's.
      begin: applied to the drawn state. What comes out is saved as the checkpoint of step 0, from which the
        run goes on like any other: other stages' variables are data of the run, not of its program.
      **settings: what decides the run besides its `trajectory`.
    """
    config, own = self.config, supervised.get_stage(self.config, name)
    folder, mesh = folder or name, training.mesh(config)
    key = jax.random.key(config.seed) if key is None else key
    sampler = self.sampler(own, source)
    loader = training.make_loader(config, source, own.batch_size, sampler=sampler)
    settings = {**self.trajectory(name), 'run': folder, **settings}
    steps = supervised.num_steps(config, own, self.sources.counts)
    training.say(f'{folder} ({own.title}): {steps} steps')
    if begin is not None:
      checkpoints = Checkpoints(str(self.workdir / folder), config=settings)
      if not checkpoints.steps:
        init = parallel.shard_program(program, mesh).init
        checkpoints.save(0, begin(init(key)), loader.get_state())
      checkpoints.close()
    try:
      return fit(
        program,
        loader,
        num_steps=steps,
        key=key,
        mesh=mesh,
        workdir=str(self.workdir / folder),
        config=settings,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        description=folder,
      )[0]
    finally:
      loader.close()

  def sampler(self, stage: ConfigDict, source: data.Source) -> Callable[[int], np.ndarray] | None:
    """Returns the sampler of a stage over `source`."""
    if stage.sampler is None:
      return None
    kinds = {
      'class_balanced': samplers.ClassBalancedSampler,
      'class_aware': samplers.ClassAwareSampler,
      'square_root': samplers.SquareRootSampler,
    }
    draws = supervised.epoch_size(self.config, stage, self.sources.counts)
    return kinds[stage.sampler](long_tail.source_labels(source), self.config.seed, draws)

  def trajectory(self, name: str) -> dict[str, Any]:
    """Returns the settings that decide what a stage ends with: those of the stages it builds on, too."""
    config = self.config

    def ancestry(name: str | None) -> Any:
      if not name:
        return None
      if name not in config.stages:  # made of a stage's runs: BTM's average
        return {**config[name].to_dict(), 'of': ancestry(config[name].of)}
      own = {k: v for k, v in config.stages[name].to_dict().items() if k not in ('title', 'role')}
      return {**own, 'start': ancestry(own['start']), 'teacher': ancestry(own['teacher'])}

    own = {
      k: v for k, v in config.data.to_dict().items() if k not in ('num_threads', 'num_workers')
    }
    rest = {k: config[k].to_dict() for k in ('model', 'augment')}
    features = config.features and digest(self.sources.train)
    return {**rest, 'data': own, 'features': features, 'seed': config.seed, **(ancestry(name))}

  def outputs(
    self,
    name: str,
    variables: Mapping[str, PyTree] | None = None,
    source: data.Source | None = None,
    *,
    split: str = 'test',
    method: str = '__call__',
  ) -> np.ndarray:
    """Returns logits (or `method='features'`) of all records, `[records, ...]`, in eval mode.

    Args:
      name: the stage whose network it is.
      variables: default: those the stage ends with.
      source: default: the test records.
      split: 'train' or 'test': how records are read (a training split is not augmented).
      method: of the `Classifier`.
    """
    config = self.config
    variables = self.variables(name) if variables is None else variables
    model = supervised.classifier(config, supervised.get_stage(config, name))
    section = FrozenConfigDict(config.data)
    fn = functools.partial(forward, variables, model=model, section=section, method=method)
    return map_batches(
      fn,
      self.sources.test if source is None else source,
      batch_size=config.eval_batch_size,
      mesh=training.mesh(config),
      **training.reading(config, split),
    )

  def labels(self) -> np.ndarray:
    """Returns the labels of the test records."""
    return long_tail.source_labels(self.sources.test)

  def score(self, probabilities: jax.typing.ArrayLike) -> dict[str, float]:
    """Returns the metrics of a row from predicted probabilities of the test records, in percent."""
    return score(self.config, probabilities, self.labels(), self.sources.counts)


@functools.partial(jax.jit, static_argnames=('model', 'section', 'method'))
def forward(
  variables: PyTree,
  batch: Mapping[str, jax.Array],
  *,
  model: models.Classifier,
  section: FrozenConfigDict,
  method: str = '__call__',
) -> jax.Array:
  """Returns logits (or `method='features'`) of a batch in eval mode, float32; `section` is `config.data`."""
  images = supervised.inputs(section, batch['image'])
  return model.apply(variables, images, method=method).astype(jnp.float32)


def digest(source: data.InMemory) -> str:
  """Returns the SHA-1 of the images (features) and labels in memory."""
  found = hashlib.sha1()
  for name in ('image', 'label'):
    found.update(np.ascontiguousarray(source.arrays[name]).data)
  return found.hexdigest()


def check(
  config: ConfigDict,
  sources: Sources,
  *,
  stages: Mapping[str, Sequence[str]] | None = None,
  rows: Sequence[str] = (),
  metrics: Sequence[str] = (),
) -> None:
  """Raises ValueError for settings that do not fit together, before anything is trained.

  Every stage of `config.runs` is built, with all that it starts from or learns from, and its variables are
  compared with theirs by shape.

  Args:
    config: the configuration.
    sources: its data.
    stages: further stages that the experiment asks for, by the setting that names them.
    rows: names of rows that are not titles of stages.
    metrics: patterns of metrics besides `METRICS`.
  """
  if not config.runs:
    raise ValueError(f'runs is empty; stages: {", ".join(config.stages)}.')
  groups(config, sources.counts)
  titles = [stage.title for stage in config.stages.values()]
  results.check_claims(
    config, '|'.join(map(re.escape, [*titles, *rows])), '|'.join([*METRICS, *metrics])
  )
  found: dict[str, dict[str, PyTree]] = {}

  def variables(name: str, asker: str, below: tuple[str, ...] = ()) -> dict[str, PyTree]:
    """Returns the shapes of what a stage ends with; `below` are those that wait for it."""
    if name == 'merged' and 'merged' in config:
      name = config.merged.of
    if name in below:
      raise ValueError(f'stages {" -> ".join([*below, name])} need one another.')
    if name in found:
      return found[name]
    try:
      own = supervised.get_stage(config, name)
    except ValueError as error:
      raise ValueError(f'{asker}: {error}') from None
    given = {
      field: variables(own[field], f'stages.{name}.{field}={own[field]!r}', (*below, name))
      for field in ('start', 'teacher')
      if own[field]
    }
    try:
      program = supervised.program(config, name, sources.counts)
      state = jax.eval_shape(program.init, jax.random.key(0))
      start, teacher = given.get('start'), given.get('teacher')
      supervised.take_over(state, start, fresh=tuple(own.fresh), teacher=teacher)
    except ValueError as error:
      raise ValueError(f'stages.{name}: {error}') from None
    found[name] = {'params': state.params, **state.model_state}
    return found[name]

  for asker, names in ({'runs': config.runs} | dict(stages or {})).items():
    for name in names:
      variables(name, f'{asker}={tuple(names)}')


def groups(config: ConfigDict, counts: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the classes with many, medium and few training images, bool `[num_classes]` each.

  `config.groups` holds `many` and `few`, limits of the training images, or `boundaries`, ranks.
  """
  options = config.groups.to_dict()
  if 'boundaries' in options:
    return long_tail.index_groups(counts, **options)
  return long_tail.shot_groups(counts, **options)


def score(
  config: ConfigDict,
  probabilities: jax.typing.ArrayLike,
  labels: np.ndarray,
  counts: np.ndarray,
) -> dict[str, float]:
  """Returns mean, harmonic, geometric and lowest recall, those of groups, and calibration, in percent.

  A group without classes is left out.
  """
  probabilities = np.asarray(probabilities)
  predictions = probabilities.argmax(-1)
  found = recall_metrics(
    predictions, labels, config.data.num_classes, groups=groups(config, counts)
  )
  confidence = np.minimum(probabilities.max(-1), 1.0)  # a sum of float32 may pass 1 by its last bit
  found['ece'] = float(expected_calibration_error(confidence, predictions == labels).ece)
  return {name: 100 * float(value) for name, value in found.items() if np.isfinite(value)}


def stage_rows(
  trainer: Trainer, names: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
  """Trains stages and returns their rows and, by the rows' names, the predicted probabilities."""
  rows, probabilities = [], {}
  for name in names:
    own = supervised.get_stage(trainer.config, name)
    probabilities[own.title] = softmax(trainer.outputs(name))
    rows.append(results.row(own.title, own.role, trainer.score(probabilities[own.title])))
  return rows, probabilities


def softmax(logits: jax.typing.ArrayLike) -> np.ndarray:
  """Returns the probabilities of logits `[..., num_classes]`, on the host."""
  return np.asarray(jax.nn.softmax(jnp.asarray(logits), axis=-1))


def finish(
  config: ConfigDict, rows: Sequence[dict[str, Any]], extra: Sequence[str] = (), note: str = ''
) -> dict[str, Any]:
  """Prints the table, with `note` in its title and the `extra` metrics, and returns the results."""
  title = f'{config.paper}, {config.setting}, seed {config.seed}: recalls in %{note}'
  results.print_table(title, rows, [*METRICS, *extra])
  return results.results(config, rows, results.measured_claims(config, rows))


def draw_recalls(
  trainer: Trainer, probabilities: Mapping[str, np.ndarray], path: pathlib.Path
) -> None:
  """Draws the recall of every class for the rows `config.pictured`; classes sorted by training images."""
  shown = {name: probabilities[name] for name in trainer.config.pictured if name in probabilities}
  if jax.process_index() or not shown:
    return
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  config, counts = trainer.config, trainer.sources.counts
  order = np.argsort(-counts, kind='stable')
  figure, axis = plt.subplots(figsize=(7.5, 4.2))
  for position, (name, values) in enumerate(shown.items()):
    confusion = evaluation.confusion_matrix(
      values.argmax(-1), trainer.labels(), config.data.num_classes
    )
    recall = 100 * np.asarray(evaluation.per_class_recall(confusion))[order]
    places = np.arange(len(order))
    if len(order) <= 30:
      width = 0.8 / len(shown)
      axis.bar(places + (position + 0.5) * width - 0.4, recall, width, label=name)
    else:
      axis.plot(places, recall, linewidth=0.8, label=name)
  if len(order) <= 30:
    axis.set_xticks(places, [f'{c}\n{counts[c]}' for c in order], fontsize=8)
  axis.set_xlabel('class and its training images' if len(order) <= 30 else 'classes by images')
  axis.set_ylabel('recall (%)')
  axis.set_title(f'{config.paper}, {config.setting}, seed {config.seed}')
  axis.legend(frameon=False, ncols=len(shown), loc='upper center', fontsize=8)
  axis.set_ylim(0, 115)
  axis.grid(alpha=0.3, axis='y')
  figure.tight_layout()
  figure.savefig(str(path), dpi=120)
  plt.close(figure)


def lower(config: ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, jax.stages.Lowered]:
  """Returns the train steps of the stages `config.runs`, lowered for a mesh."""
  from jaxlab.parallel import aot

  return {name: aot.lower_step(supervised.program(config, name), mesh) for name in config.runs}
