"""Networks trained in several ways: how large their activations become, and what coarse quantization costs.

Each training has the same data, network and recipe and its own loss, optimizer or precision. Of each are
compared: the network in float; the peak of every block's output, in training and at the end; the alignment of
consecutive weights; and the network quantized by the largest magnitude, one static number a tensor, which is
what outliers break.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

from experiments.harness import costs, networks, results, runs, supervised
from experiments.harness import data as harness_data
from experiments.harness.data import Images, Sentences
from experiments.harness.networks import Loaded, Network
from experiments.harness.runs import Run, Trained, Variables, say
from experiments.harness.sections import Experiment, check_batch
from experiments.harness.settings import found_by, free, section
from experiments.harness.supervised import Loss, cross_entropy
from experiments.protocols import absmax_evaluation, outlier_statistics
from experiments.protocols.absmax_evaluation import SCHEMES, metric, metric_pattern
from experiments.protocols.outlier_statistics import PAIRS, Watched
from jaxlab import models
from jaxlab.evaluation import OutlierStatistics
from jaxlab.models import any_of

UNITS = {'accuracy': 'accuracies in %', 'perplexity': 'perplexities of a token'}


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Training inputs that the ranges of activations are of."""

  count: int = 512
  batch_size: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of a comparison of trainings.

  Attributes:
    network: the network with its data and recipe.
    bits: bit-widths of quantization such as '4w4a'; 16 stands for float.
    schemes: of quantization, by name, see `protocols.absmax_evaluation`.
    calibration: of the quantization.
    runs: rows, of the paper's trainings.
    timed: repeats of the measurement of a step's cost; 0: none.
  """

  network: Network
  bits: tuple[str, ...] = ('8w8a', '4w4a', '16w3a', '3w3a')
  schemes: tuple[str, ...] = SCHEMES
  calibration: Calibration = section(Calibration)
  runs: tuple[str, ...] = ()
  timed: int = free(5)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    own, size = self.network, self.calibration
    if (
      not 1 <= size.batch_size <= size.count <= own.data.train_size or size.count % size.batch_size
    ):
      yield (
        f'calibration: expected at most {own.data.train_size} inputs in whole batches, got {size.count} in '
        f'batches of {size.batch_size}.'
      )
    if self.timed < 0:
      yield f'timed={self.timed}: expected a number of repeats, or 0 for none.'
    if own.recipe is None:
      yield 'network.recipe: expected the recipe of a training.'
      return
    yield from check_batch(self.mesh, own.recipe.batch_size, 'network.recipe.batch_size')
    if own.data.train_size < own.recipe.batch_size:
      yield (
        f'network.recipe.batch_size={own.recipe.batch_size} exceeds the {own.data.train_size} training '
        'records.'
      )

  @property
  def model(self) -> nn.Module:
    """The network."""
    return networks.create(self.network.model)


class Training(NamedTuple):
  """How a row's network is trained.

  Attributes:
    title: name of the row.
    role: of the row.
    loss: `(outputs, targets, seen) -> values`; `seen.captured` has the outputs of all blocks.
    options: further ones of `supervised.program`, such as an optimizer or hooks.
    decides: sections and values, by name, that decide loss and options.
    judged: the model's own variables of what the training ends with.
    watched: scalars of every step, by name, which become metrics.
  """

  title: str
  role: str
  loss: Loss = cross_entropy
  options: Mapping[str, Any] = {}
  decides: Mapping[str, Any] = {}
  judged: Callable[[Variables], Variables] = lambda variables: variables
  watched: Mapping[str, Watched] = {}


Table = Mapping[str, Training]


def training(config: Settings, own: Training) -> Run:
  """Returns a training in which the peak of every block is watched."""
  parts = models.anatomy(config.model)
  return networks.training(
    config,
    config.network,
    own.title,
    loss=own.loss,
    captured=[any_of(parts.block_paths)],
    watched={**outlier_statistics.block_peaks(parts), **own.watched},
    decides=own.decides,
    **own.options,
  )


def check(
  config: Settings, table: Table, further: Iterable[str] = (), rows: Iterable[str] = ()
) -> Iterator[str]:
  """Yields what is wrong with network, rows and claims; `further` and `rows` match other metrics and rows."""
  yield from check_network(config)
  if not config.runs:
    yield f'runs is empty; trainings: {", ".join(table)}.'
  if len(set(config.runs)) < len(config.runs):
    yield f'runs={",".join(config.runs)}: each training may be there once.'
  for name in config.runs:
    if name not in table:
      yield f'runs: there is no training {name!r}; trainings: {", ".join(table)}.'
  measure = rf'({config.network.measure}|bits_per_token)'
  own = (measure, metric_pattern(measure), 'peak', 'training_peak', 'kurtosis', 'loss')
  own += (rf'colinearity_({"|".join(PAIRS)})', 'time', 'memory', 'flops')
  rows = [*(re.escape(item.title) for item in table.values()), *rows]
  yield from results.check_claims(config, rows, [*own, *further])


def check_network(config: Settings) -> Iterator[str]:
  """Yields why a network, or its data, cannot be measured here, and what is wrong with patterns."""
  own = config.network
  if isinstance(own.data, Sentences) or (isinstance(own.data, Images) and not own.data.labeled):
    yield f'network.data: {own.data.name!r} has no labels that a network could be trained on.'
    return
  yield from check_patterns(own)
  found = list(found_by('network.model', models.anatomy, config.model))
  if found:
    yield from found
    return
  parts = models.anatomy(config.model)
  yield from absmax_evaluation.check(config.bits, config.schemes, parts)
  if any(block.stacked for block in parts.blocks):
    yield (
      'network.model.scan: the blocks are stacked, and cannot be measured and quantized one by one; leave '
      'scan out.'
    )
    return
  params = {}

  def pairs() -> None:
    found = [pair for kind in PAIRS for pair in models.weight_pairs(config.model, (kind,))]
    params.update(supervised.abstract_variables(config.model, own.task)['params'])
    jax.eval_shape(lambda params: [pair(params) for pair in found], params)

  for problem in found_by('network.model', pairs):
    yield f'{problem} Measured are transformers whose attention and MLPs have two layers each.'
  if not params:
    return
  paths = traverse_util.flatten_dict(params, sep='/')
  for pattern in own.fan_in_scaled:
    if not list(found_by('', compiled, pattern)) and not any(
      re.fullmatch(pattern, path) for path in paths
    ):
      yield f'network.fan_in_scaled: {pattern!r} matches none of the {len(paths)} parameters.'


def check_patterns(own: Network) -> Iterator[str]:
  """Yields which of a network's patterns are no regular expressions."""
  given = {'fan_in_scaled': own.fan_in_scaled}
  if own.recipe is not None:
    optimizer = own.recipe.optimizer
    given |= {
      'recipe.optimizer.no_decay': optimizer.no_decay or (),
      'recipe.optimizer.lr_multipliers': [pattern for pattern, _ in optimizer.lr_multipliers],
      'recipe.partition': [pattern for pattern, _ in own.recipe.partition],
    }
  for name, patterns in given.items():
    for pattern in patterns:
      yield from found_by(f'network.{name}', compiled, pattern)


def compiled(pattern: str) -> re.Pattern:
  """Returns a regular expression; raises ValueError for what is none."""
  try:
    return re.compile(pattern)
  except re.error as error:
    raise ValueError(f'{pattern!r} is no regular expression: {error}.') from error


def programs(config: Settings, table: Table) -> dict[str, Run]:
  """Returns the trainings of `config.runs`."""
  return {name: training(config, table[name]) for name in config.runs}


class Row(NamedTuple):
  """A trained network and what was measured.

  Attributes:
    training: of the table.
    network: in float, with its data.
    history: rows of metrics of the training.
    blocks: statistics of the outputs on the test records: peaks the largest, else means; `[blocks]`.
    metrics: of the row.
  """

  training: Training
  network: Loaded
  history: list[dict[str, Any]]
  blocks: OutlierStatistics
  metrics: dict[str, float]


def compare(
  config: Settings,
  workdir: Any,
  table: Table,
  further: Callable[[Loaded, Trained], Mapping[str, float]] = lambda network, trained: {},
) -> dict[str, Row]:
  """Returns a row of each training of `config.runs`, and draws them.

  Metrics: `accuracy` (percent; of tokens `perplexity` and `bits_per_token`) in float, and quantized
  (`absmax_evaluation.metric`); `loss`, and what is `watched`, of the last steps of the training;
  `training_peak`, the largest `max |A|` of any block in any step; `peak`, the same of the trained network on
  test records; `kurtosis`, that of one record's activations, averaged over records, of the block where it is
  largest; `colinearity_mlp` and `colinearity_vo`, the mean index of the pairs; `time`, `memory` and `flops`
  of a step over those of plain training that watches nothing.

  Args:
    config: the experiment.
    workdir: a training lies in the folder of its name.
    table: of trainings.
    further: `(network, what its training ends with) -> more metrics of the row`.
  """
  own, sizes = config.network, config.calibration
  records = {split: harness_data.load(own.data, split) for split in ('train', 'test')}
  cost = relative_costs(config, table) if config.timed else {}
  found: dict[str, Row] = {}
  for name in config.runs:
    item = table[name]
    trained = runs.train(training(config, item), records['train'], workdir / name)
    network = Loaded(config, own, config.model, item.judged(trained.variables), **records)
    blocks = outlier_statistics.over_records(network)
    metrics = outlier_statistics.of_training(trained, list(item.watched))
    metrics |= scores(network.score(network.variables))
    metrics |= {'peak': float(blocks.peak.max()), 'kurtosis': float(blocks.kurtosis.max())}
    metrics |= outlier_statistics.alignment(network)
    batches = network.calibration(sizes.count, sizes.batch_size)
    metrics |= absmax_evaluation.quantized_scores(
      network, config.bits, config.schemes, batches, scores
    )
    metrics |= dict(further(network, trained)) | cost.get(name, {})
    say(f'{item.title}: ' + ', '.join(f'{key} {value:.4g}' for key, value in metrics.items()))
    found[name] = Row(item, network, trained.history, blocks, metrics)
  titled = {row.training.title: row for row in found.values()}
  outlier_statistics.draw_peaks(
    config,
    {title: row.blocks for title, row in titled.items()},
    {title: row.history for title, row in titled.items()},
    workdir / 'peaks.png',
  )
  absmax_evaluation.draw_bits(
    config, config.bits, config.schemes, {title: row.metrics for title, row in titled.items()},
    own.measure, workdir / f'{own.measure}_over_bits.png',
  )  # fmt: skip
  return found


def relative_costs(config: Settings, table: Table) -> dict[str, dict[str, float]]:
  """Returns `time`, `memory` and `flops` of a step of each of `config.runs`, over those of a bare one."""
  bare = networks.training(config, config.network, 'bare').program
  sides = {name: run.program for name, run in programs(config, table).items()}
  sides = {name: costs.Side(program) for name, program in {'': bare, **sides}.items()}
  say('costs of a step')
  found = costs.relative(sides, '', config.mesh.make(), config.timed)
  del found['']
  return found


def scores(found: Mapping[str, float]) -> dict[str, float]:
  """Returns the metrics of what `Loaded.score` returns."""
  found = {name: value for name, value in found.items() if name != 'logit_mse'}
  if 'perplexity' in found:
    found['bits_per_token'] = float(np.log2(found['perplexity']))
  return found


def table_rows(found: Mapping[str, Row]) -> list[dict[str, Any]]:
  """Returns the rows of the results."""
  return [results.row(own.training.title, own.training.role, own.metrics) for own in found.values()]


def add_ratios(
  rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, str], baseline: str = 'plain'
) -> None:
  """Adds metrics over those of the row `baseline` to all rows that have them; nothing without this row.

  Args:
    rows: of the results.
    ratios: names of metrics by those of their ratios.
    baseline: name of a row.
  """
  unit = next((item['metrics'] for item in rows if item['name'] == baseline), {})
  for new, name in ratios.items():
    for item in rows:
      if name in unit and name in item['metrics']:
        item['metrics'][new] = item['metrics'][name] / unit[name]


def shown(config: Settings, *further: str) -> list[str]:
  """Returns the metrics that the table shows, in order."""
  measure = config.network.measure
  extra = ['bits_per_token'] if measure == 'perplexity' else []
  quantized = [metric(measure, bits, by) for by in config.schemes for bits in config.bits]
  own = ['training_peak', 'peak', 'kurtosis', *(f'colinearity_{kind}' for kind in PAIRS)]
  return [measure, *extra, *quantized, *own, *further, 'time', 'memory', 'flops']
