"""MIST: Minimal Interaction Separated Tuning (Tang et al., CVPR 2025, arXiv 2406.17559).

A device adapts a network that it cannot even run. A cloud runs the frozen network and sends, once for each
image, the sum of what its layers hand on, as large as one layer's tokens:

  s = z_0 + z_1 + ... + z_N

The device trains a tiny network of low-rank attention and a head on it (`python -m experiments edge`), knows
no backbone, and sends nothing back. Claim: near the accuracy of methods that see every layer, with a fraction
of the bytes, of the trained numbers and of the memory.

  python -m experiments.mist
  python -m experiments.mist --config.role=cloud --workdir=CLOUD     # writes features; on the device then:
  python -m experiments edge --features=CLOUD/features/all_float32 --workdir=DEVICE
  python -m experiments.mist --config=vtab_vit_base --config.tasks=caltech101, --workdir=DIR
"""

import contextlib
import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.harness import launcher, pictures, results
from experiments.harness.runs import Run, Variables, say
from experiments.harness.settings import found_by, free, section
from experiments.harness.tasks import ImageTask
from experiments.protocols import (
  adaptation,
  adaptation_checks,
  adaptation_comparison,
  edge_training,
  gathered_features,
)
from experiments.protocols.adaptation import Row
from experiments.protocols.adaptation_baselines import BASELINES
from experiments.protocols.edge_training import Edge
from experiments.protocols.gathered_features import Gather, Reading, Suffix
from experiments.protocols.side_adaptation import side_attention
from jaxlab import adapters, data
from jaxlab.data import FeatureFile, FeatureHeader

UNITS = (
  'accuracy in %; numbers that are trained; megabytes kept by a step; kilobytes sent for an image'
)
COSTS = ('trained', 'trained_with_head', 'residual_mb', 'kb_per_image', 'step_over_forward')


class EdgeRow(NamedTuple):
  """A row that is trained on files of features alone.

  Attributes:
    title: in tables.
    role: 'baseline' or 'method'.
    gather: what is sent.
    edge: what is trained on it.
  """

  title: str
  role: str
  gather: Gather
  edge: Edge


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(adaptation.Settings):
  """Settings of MIST.

  Attributes:
    edge: the device's network.
    k: of the layers z_0 ... z_k that are summed; None: all.
    spaced: whether k is the number of layers at equal gaps instead, from z_0 to z_N.
    role: 'both': cloud and device, compared with others; 'cloud': features of all tasks, in files.
    serve: `host:port` where a cloud then waits for one device and sends them; port 0: any free one.
    sent: type of what the cloud sends; that of the row `mist_float16` is its own.
    suffix: of the files; `.array_record` are never in memory as a whole.
    views: augmented views of each training image that are sent, where a task augments them.
    timed: calls that a step and the network's forward pass are timed over; 0: not.
    reference: the side network that is given every layer.
  """

  edge: Edge = section(Edge)
  k: int | None = None
  spaced: bool = False
  role: Literal['both', 'cloud'] = 'both'
  serve: str = free('')
  sent: Literal['float32', 'float16'] = 'float32'
  suffix: Suffix = '.npz'
  views: int = 1
  timed: int = free(0)
  reference: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  runs: tuple[str, ...] = ('linear', 'all_layers', 'mist')

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    yield from found_by('k', layers, self)
    if self.spaced and self.k is None:
      yield 'spaced=True: expected k, the number of layers; now all are summed.'
    same = self.role == 'both' and self.sent == 'float16'
    if same and {'mist', 'mist_float16'} <= {*self.runs}:
      yield f"sent='float16', runs={self.runs}: mist and mist_float16 are the same; expected one of them."
    if self.serve and self.role != 'cloud':
      yield f"serve={self.serve!r}: expected role='cloud', now {self.role!r}."
    if self.serve and not re.fullmatch(r'[^:]+:\d{1,5}', self.serve):
      yield f'serve={self.serve!r}: expected host:port, such as 127.0.0.1:7000.'
    elif self.serve:
      yield from found_by('serve', data.parse_address, self.serve)
    for name, least in (('views', 1), ('timed', 0)):
      if getattr(self, name) < least:
        yield f'{name}={getattr(self, name)}: expected at least {least}.'
        return
    if len(self.edge.pairs(self.recipe)) > 1:
      yield from self._check_search()

  def _check_search(self) -> Iterator[str]:
    """Yields why rates of the device cannot be chosen on held-out records."""
    for task in {*self.tasks} & {*self.target}:
      records, size = sent_images(self, task), self.target[task].size
      if records > size:
        yield (
          f'edge.rates={self.edge.rates}, edge.decays={self.edge.decays}: expected one of each with '
          f'views={self.views} of {task}: the held-out records would be views of images trained on.'
        )
      elif records - self.edge.held_out < self.recipe.batch_size:
        yield (
          f'edge.held_out={self.edge.held_out}: expected at least a batch of {self.recipe.batch_size} to be '
          f'left of the {records} records of {task}.'
        )


def layers(config: Settings) -> tuple[int, ...] | None:
  """Returns the layers that are summed, None: all."""
  if config.k is None:
    return None
  chosen = adapters.spaced_layers if config.spaced else adapters.leading_layers
  return chosen(config.k, adaptation.backbone(config).depth)


def edge_table(config: Settings) -> dict[str, EdgeRow]:
  """Returns the rows of the device that `config.runs` may name."""
  edge, depth = config.edge, adaptation.backbone(config).depth
  summed, last = Gather(layers(config), config.sent), Gather((depth,), config.sent)
  narrow = summed._replace(dtype='float16')
  probe, mlp = dataclasses.replace(edge, depth=0), dataclasses.replace(edge, kind='mlp')
  return {
    'mist': EdgeRow('MIST', 'method', summed, edge),
    'mist_float16': EdgeRow('MIST, float16', 'method', narrow, edge),
    'last_layer': EdgeRow('attention on the last layer', 'baseline', last, edge),
    'mlp': EdgeRow('MLP on the sum', 'baseline', summed, mlp),
    'linear_sum': EdgeRow('linear on the sum', 'baseline', summed, probe),
  }


def table(config: Settings) -> dict[str, Row]:
  """Returns the rows that see the network itself: baselines, and a side network given every layer."""
  make = functools.partial(side_attention, **config.reference)
  row = Row('attention on every layer', 'baseline', make, config.reference)
  return {**BASELINES, 'all_layers': row}


def split_runs(config: Settings) -> tuple[Settings, list[str]]:
  """Returns the settings with the rows that see the network alone, and the names of the others."""
  edge = [name for name in config.runs if name in edge_table(config)]
  others = tuple(name for name in config.runs if name not in edge)
  return dataclasses.replace(config, runs=others, claims=(), pictured=()), edge


def nominal_header(config: Settings, gather: Gather, task: str, **fields: Any) -> FeatureHeader:
  """Returns the header of a task's training features, with blank fingerprints."""
  model = adaptation.backbone(config, **fields)
  rows, columns = model.grid
  target = config.target[task]
  return FeatureHeader(
    network='', data='', layers='', dtype=gather.dtype, count=sent_images(config, task),
    shape=(model.num_prefix_tokens + rows * columns, model.width),
    num_classes=target.data.num_classes, num_prefix_tokens=model.num_prefix_tokens,
    views=views_of(config, task),
  )  # fmt: skip


def sent_images(config: Settings, task: str) -> int:
  """Returns the training features of a task: as many as images, or their augmented views."""
  return config.target[task].size * views_of(config, task)


def views_of(config: Settings, task: str) -> int:
  """Returns the records of each training image of a task."""
  return config.views if config.target[task].augment.kind != 'none' else 1


def edge_runs(config: Settings) -> dict[str, Run]:
  """Returns the device's trainings on the first task, by row."""
  found, task = {}, config.tasks[0]
  for name in split_runs(config)[1]:
    row = edge_table(config)[name]
    own = nominal_header(config, row.gather, task)
    _, found[f'{name}_{task}'] = edge_training.training(
      config,
      row.edge,
      own,
      config.recipe,
      f'{row.title}, {task}',
      own.count,
    )
  return found


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  known = {**table(config), **edge_table(config)}
  if unknown := [name for name in config.runs if name not in known]:
    yield f'runs: {", ".join(map(repr, unknown))} are none of the rows {", ".join(known)}.'
    return
  others, edge = split_runs(config)
  if (edge or config.role == 'cloud') and jax.process_count() > 1:
    yield f'features are gathered by one process; there are {jax.process_count()}.'
  model = adaptation.backbone(config)
  token = config.pool == 'model' and getattr(model, 'pooling', '') == 'token'
  read = 'cls' if token else 'mean_patches'
  if others.runs and edge and config.edge.pool != read:
    yield (
      f'edge.pool={config.edge.pool!r}: expected {read!r}, what the heads of {", ".join(others.runs)} read '
      f'by pool={config.pool!r}.'
    )
  if others.runs:
    yield from adaptation_checks.check(others, table(config))
  if adaptation_checks.can_be_built(config):
    yield from found_by('edge', edge_runs, config)
  titles = [re.escape(row.title) for row in known.values()]
  groups = {target.group for target in config.target.values()}
  names = [*config.target, *groups, 'mean', *COSTS]
  yield from results.check_claims(config, titles, list(map(re.escape, names)))


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns each row's training on the first task, and that on the source task."""
  del facts
  others, _ = split_runs(config)
  return {**adaptation_comparison.programs(others, table(config)), **edge_runs(config)}


def cloud(
  config: Settings, variables: Variables, gather: Gather, folder: pathlib.Path
) -> list[FeatureFile]:
  """Writes the features of all tasks, `<folder>/<task>-{train,test}`; returns the files in this order."""
  model, files = adaptation.backbone(config), []
  for task in config.tasks:
    target = config.target[task]
    own = adaptation_comparison.sources(config, target)
    views = config.views if target.augment.kind != 'none' else 0
    seen, judged = ImageTask.of(target.data, target.augment), target.test or target.data
    for split, source, reading in (
      ('train', own.train, Reading(target.data, seen, views, config.seed)),
      ('test', own.test, Reading(judged, ImageTask.of(judged))),
    ):
      path = folder / f'{task}-{split}{config.suffix}'
      files.append(
        gathered_features.feature_file(config, path, gather, reading, model, variables, source)
      )
  return files


def device(
  config: Settings, name: str, files: Sequence[FeatureFile], workdir: pathlib.Path
) -> dict[str, float]:
  """Trains a row on what `cloud` returns, read in the row's type, task by task; returns accuracies."""
  row, found = edge_table(config)[name], {}
  for task, *pair in zip(config.tasks, files[::2], files[1::2], strict=True):
    train, test = (file.astype(row.gather.dtype) for file in pair)
    ended = edge_training.train(
      config,
      row.edge,
      config.recipe,
      train,
      test,
      workdir / f'{name}_{task}',
      f'{row.title}, {task}',
    )
    found[task] = ended.accuracy
    say(f'{row.title}, {task}: accuracy {ended.accuracy:.4g}')
  return found


def devices(
  config: Settings, variables: Variables, names: Sequence[str], workdir: pathlib.Path
) -> dict[str, dict[str, float]]:
  """Trains rows; returns accuracies by row. Rows of the same layers read one file a task and split."""
  gathers = {name: edge_table(config)[name].gather for name in names}
  found = {}
  for chosen in dict.fromkeys(gather.layers for gather in gathers.values()):
    own = {name: gather for name, gather in gathers.items() if gather.layers == chosen}
    widest = max(own.values(), key=lambda gather: np.dtype(gather.dtype).itemsize)
    files = cloud(config, variables, widest, workdir / 'features' / widest.layer_names)
    found |= {name: device(config, name, files, workdir) for name in own}
  return found


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Gathers the features of every task, trains devices on them, and compares with who sees the network."""
  others, edge = split_runs(config)
  gathers = edge or config.role == 'cloud'
  if gathers and config.suffix != '.npz' and '://' in str(workdir):
    raise ValueError(f'suffix={config.suffix!r}: expected .npz in --workdir={workdir}.')
  if config.role == 'cloud':
    return only_cloud(config, workdir)
  if not others.runs:
    adaptation_comparison.require_sources(config)
  rows = adaptation_comparison.compare(others, workdir, table(config)) if others.runs else []
  for item, name in zip(rows, others.runs, strict=True):
    item['metrics'].pop('temporary_mb', None)
    item['metrics'] |= sent_by_others(config, name)
  variables = adaptation_comparison.load(config, workdir)
  forward = forward_seconds(config, variables) if config.timed else 0.0
  groups = {task: config.target[task].group for task in config.tasks}
  scores = devices(config, variables, edge, workdir)
  for name in edge:
    row, own = edge_table(config)[name], scores[name]
    metrics = {**own, **data.group_means(own, groups), **edge_costs(config, row, forward)}
    rows.append(results.row(row.title, row.role, metrics))
  draw(config, rows, workdir / 'accuracy_over_transfer.png')
  names = [*config.tasks, *dict.fromkeys(groups.values()), 'mean', *COSTS]
  return results.results(config, rows, names, UNITS)


def only_cloud(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Writes what devices need, serves it if asked to, and tells the bytes.

  What cannot be waited at or read is told before anything is computed.
  """
  gather = Gather(layers(config), config.sent)
  folder = workdir / 'features' / gather.name
  with contextlib.ExitStack() as stack:
    if config.serve:
      server = stack.enter_context(data.listening(*data.parse_address(config.serve)))
    adaptation_comparison.require_sources(config)
    files = cloud(config, adaptation_comparison.load(config, workdir), gather, folder)
    metrics = {
      'kb_per_image': files[0].header.record_bytes / 1e3,
      'images': sum(len(file) for file in files),
      'file_mb': sum(epath.Path(file.path).stat().length for file in files) / 1e6,
    }
    say(f'{folder}: python -m experiments edge --features={folder} --workdir=DIR')
    if config.serve:
      metrics['wire_mb'] = gathered_features.serve(server, files) / 1e6
  bare = dataclasses.replace(config, claims=(), pictured=())
  return results.results(bare, [results.row('cloud', 'reference', metrics)], [*metrics])


def sent_by_others(config: Settings, name: str) -> dict[str, float]:
  """Returns what would be sent for an image to a device that trains a row, in the type that is sent here.

  A probe needs the pooled feature, the side network all layers' tokens. Others need the network itself.
  """
  shape = nominal_header(config, Gather(), config.tasks[0]).shape
  depth = adaptation.backbone(config).depth
  sizes = {
    'linear': adapters.transfer_bytes(shape[1:], config.sent),
    'all_layers': adapters.transfer_bytes(
      shape, config.sent, num_tensors=depth // config.reference.get('gap', 1) + 1
    ),
  }
  return {'kb_per_image': sizes[name] / 1e3} if name in sizes else {}


def edge_costs(config: Settings, row: EdgeRow, forward: float) -> dict[str, float]:
  """Returns what a step of a row costs on the first task; see `COSTS`.

  Memory is counted where the settings say so (`accounted`); `step_over_forward` is the time of a training
  step on the device over that of the network's forward pass of as many images, on this machine.
  """
  fields = dict(config.accounted)
  size = fields.pop('batch_size', config.recipe.batch_size)
  recipe = dataclasses.replace(config.recipe, batch_size=size)
  counted = nominal_header(config, row.gather, config.tasks[0], **fields)
  own = nominal_header(config, row.gather, config.tasks[0])
  made = edge_training.edge_training(row.edge, counted, recipe, 1)
  params = jax.eval_shape(made.program.init, jax.random.key(0)).params
  judged = edge_training.edge_training(row.edge, own, config.recipe, 1)
  numbers = jax.eval_shape(judged.program.init, jax.random.key(0)).params
  trained = {part: adapters.count_parameters(tree) for part, tree in numbers.items()}
  found = {
    'trained': trained['modules'] + trained['norm'],
    'trained_with_head': sum(trained.values()),
    'residual_mb': adapters.residual_bytes(made.loss, params, made.program.batch) / 1e6,
    'kb_per_image': own.record_bytes / 1e3,
  }
  if forward:
    found['step_over_forward'] = edge_training.step_seconds(judged, config.timed) / forward
  return found


def forward_seconds(config: Settings, variables: Variables) -> float:
  """Returns the median time of the network's forward pass of a training batch on this machine."""
  model = adaptation.backbone(config)
  x = jnp.zeros((config.recipe.batch_size, *config.network.data.view), np.float32)
  call = jax.jit(functools.partial(Gather().gathered, model))
  return edge_training.median_seconds(call, config.timed, variables, x)


def draw(config: Settings, rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Draws the mean accuracy over the bytes that are sent for an image."""
  with pictures.drawn(path, size=(5.5, 3.8)) as axis:
    for item in rows:
      own = item['metrics']
      if (config.pictured and item['name'] not in config.pictured) or 'kb_per_image' not in own:
        continue
      marker = '*' if item['role'] == 'method' else 'o'
      axis.scatter(own['kb_per_image'], own['mean'], marker=marker, s=60, label=item['name'])
    axis.set(xscale='log', xlabel='sent for an image (kB)', ylabel='mean accuracy (%)')
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(pictures.title(config), fontsize=9)


if __name__ == '__main__':
  launcher.main('mist')
