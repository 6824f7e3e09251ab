"""Post-training quantization: float, quantized, and what is fitted behind the quantized network, over bits.

For each network and each bit-width: ranges from `calibration.ranges` training inputs (RepQ-ViT for
transformers, percentiles for convolutional networks), or GPTQ's weights from `calibration.compensation` of
them; then every compensation in closed form, block by block, on the latter, of which the former are the
first; then what goes on from one of these networks.
"""

import pathlib
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.harness import data as harness_data
from experiments.harness import networks, pictures, results
from experiments.harness.networks import Loaded
from experiments.harness.results import row
from experiments.harness.runs import Variables, say
from experiments.protocols.quantized_networks import (
  Method,
  Settings,
  compensate,
  megabytes,
  quantize,
  quantize_by_gptq,
)
from jaxlab import models, quantizers
from jaxlab.quantizers import compensation

MEASURES = ('accuracy', 'agreement', 'perplexity', 'rank_correlation', 'relative_error')
METRICS = (
  *MEASURES, *(f'integer_{name}' for name in MEASURES),
  'megabytes', 'logit_mse', 'logit_mse_ratio', 'block_error_ratio',
)  # fmt: skip


class Point(NamedTuple):
  """One network at one bit-width.

  Attributes:
    name: of the network.
    bits: the bit-width.
    network: in float, with its data.
    quantized: the network quantized alone.
    base: that of the row that is gone on from.
    folder: of the experiment.
  """

  name: str
  bits: str
  network: Loaded
  quantized: quantizers.Quantized
  base: quantizers.Quantized
  folder: pathlib.Path


class Further(NamedTuple):
  """A row that goes on from another.

  Attributes:
    role: of the row.
    base: the row that it starts from, 'PTQ' or a method.
    make: `point -> variables`, which are run under the hooks of `point.base`; None: no such network there.
  """

  role: str
  base: str
  make: Callable[[Point], Variables | None]


NONE: Mapping[str, Any] = types.MappingProxyType({})


def check(
  config: Settings, methods: Mapping[str, Method], further: Iterable[str] = ()
) -> Iterator[str]:
  """Yields what is wrong with methods and claims; `further` names other rows that there may be."""
  for name in config.networks:
    if name in config.network:
      depth = len(models.anatomy(networks.create(config.network[name].model)).blocks)
      for title, method in methods.items():
        if not 0 <= method.fitting.start_block < depth:
          yield f'{title}: start_block={method.fitting.start_block} is none of {depth} blocks ({name}).'
  known = '|'.join(map(re.escape, config.network))
  metrics = (
    rf'({known})_\d+w\d+a_({"|".join(METRICS)})', rf'({known})_extra_(parameters|multiply_adds)'
  )  # fmt: skip
  rows = map(re.escape, ('float', 'PTQ', *_searched(config), *methods, *further))
  yield from results.check_claims(config, list(rows), metrics)


def compare(
  config: Settings,
  workdir: pathlib.Path,
  methods: Mapping[str, Method],
  further: Mapping[str, Further] = NONE,
) -> dict[str, Any]:
  """Returns the results of a run: rows for the float network, quantization alone, methods and what goes on.

  Metrics are named `<network>_<bits>_<metric>`: `accuracy` (percent), `perplexity` or, without labels,
  `agreement` (percent) and `relative_error` (see `Loaded.score`), the same in integers as `integer_...`,
  `megabytes` (see there), `logit_mse` against the float network, `logit_mse_ratio` to that of quantization
  alone, `block_error_ratio`, the sum over compensated modules of the mean squared error on calibration data
  over that before; and per network `extra_parameters` and `extra_multiply_adds` (of one example). Sentences
  have `rank_correlation` and `relative_error`.
  """
  folder = type(workdir)(config.networks_dir or workdir / 'networks')
  searched = _searched(config)
  rows: dict[str, dict[str, float]] = {
    title: {} for title in ('float', 'PTQ', *searched, *methods, *further)
  }
  reports = {}
  _look_at_data(config)
  for name in config.networks:
    own, sizes = config.network[name], config.calibration
    network = networks.load(config, own, folder / f'{name}-seed{config.seed}')
    (ranges,) = network.calibration(sizes.ranges, sizes.ranges)
    batches = network.calibration(sizes.compensation, sizes.batch_size)
    reference = network.score(network.variables)
    say(f'{name} in float: {_text(reference)}')
    reference.pop('logit_mse')
    programs = compensation.Programs()
    for bits in config.bits:
      quantized = quantize(own, network.model, network.variables, ranges, bits, batches)
      alone = network.score(*quantized.unbind())
      at = _At(rows, name, bits, alone['logit_mse'])
      at.add('float', reference, network.variables)
      at.add('PTQ', alone, quantized.unbind()[0])
      at.say_exceptions('PTQ', quantized)
      finished = {'PTQ': quantized}
      for title in searched:
        found = quantize_by_gptq(own, network.model, network.variables, batches, bits)
        at.add(title, network.score(*found.unbind()), found.unbind()[0])
        at.say_exceptions(title, found)
        finished[title] = found
      for title, method in methods.items():
        found = compensate(own, quantized, batches, method, programs)
        at.add(title, network.score(*found.unbind()), found.unbind()[0])
        at.add_report(title, found.report)
        finished[title], reports[name, bits, title] = found, found.report
      for title, found in finished.items() if config.integers else ():
        integers = quantizers.integer_network(found)
        at.add_integers(title, network.score(*integers.unbind()))
        if title == 'PTQ':
          at.say_exceptions('PTQ in integers', integers)
      for title, item in further.items():
        base = finished[item.base]
        variables = item.make(Point(name, bits, network, quantized, base, workdir))
        if variables is not None:
          at.add(title, network.score(variables, base.hooks), variables)
          extra = f'{name}_extra_'
          rows[title] |= {k: v for k, v in rows[item.base].items() if k.startswith(extra)}
  roles = {'float': 'reference', 'PTQ': 'baseline', 'GPTQ': 'baseline'}
  roles |= {title: item.role for title, item in (*methods.items(), *further.items())}
  listed = [row(title, roles[title], found) for title, found in rows.items() if found]
  draw(config, listed, reports, workdir)
  kinds = {name: config.network[name].measure for name in config.networks}
  shown = [f'{name}_{bits}_{kind}' for name, kind in kinds.items() for bits in config.bits]
  for what in ('relative_error', *(f'integer_{name}' for name in MEASURES)):
    shown += [f'{name}_{bits}_{what}' for name in kinds for bits in config.bits]
  for what in ('logit_mse_ratio', 'megabytes'):
    shown += [f'{name}_{config.bits[-1]}_{what}' for name in kinds]
  for what in ('parameters', 'multiply_adds'):
    shown += [f'{name}_extra_{what}' for name in kinds]
  return results.results(config, listed, shown)


def _searched(config: Settings) -> tuple[str, ...]:
  """Returns the rows whose kernels are searched."""
  return ('GPTQ',) if config.gptq else ()


class _At(NamedTuple):
  """Adds to the rows what is measured at one point; `logit_mse` is that of quantization alone."""

  rows: dict[str, dict[str, float]]
  name: str
  bits: str
  logit_mse: float

  def add(self, title: str, scored: Mapping[str, float], variables: Variables) -> None:
    """Adds the metrics and the size of a network, and says them."""
    scored = {**scored, 'megabytes': megabytes(variables)}
    if 'logit_mse' in scored:
      scored['logit_mse_ratio'] = scored['logit_mse'] / self.logit_mse
      say(f'{self.name} {self.bits} {title}: {_text(scored)}')
    self._put(title, scored)

  def say_exceptions(self, title: str, network: quantizers.Quantized) -> None:
    """Says what is quantized, and which layers are not as the rules ask, and why."""
    say(f'{self.name} {self.bits} {title}: {network.summary().splitlines()[0]}')
    kinds = {'stay in float': network.skipped, 'are rounded to nearest': network.rounded}
    for what, reasons in kinds.items():
      listed = [f'{path} ({reason})' for path, reason in reasons.items()]
      rest = [f'{len(listed) - 5} more'] if len(listed) > 5 else []
      if listed:
        say(f'{self.name} {self.bits} {title}: {what}: {", ".join(listed[:5] + rest)}')

  def add_integers(self, title: str, scored: Mapping[str, float]) -> None:
    """Adds how good the same network is with integers for kernels."""
    found = {f'integer_{key}': value for key, value in scored.items() if key in MEASURES}
    say(f'{self.name} {self.bits} {title}: {_text(found)}')
    self._put(title, found)

  def add_report(self, title: str, report: compensation.Report) -> None:
    """Adds what a compensation did and costs."""
    ratio = report.error_after.sum() / report.error_before.sum()
    self._put(title, {'block_error_ratio': ratio})
    for what in ('parameters', 'multiply_adds'):
      self.rows[title][f'{self.name}_extra_{what}'] = float(getattr(report, what).sum())

  def _put(self, title: str, found: Mapping[str, float]) -> None:
    named = {f'{self.name}_{self.bits}_{key}': float(value) for key, value in found.items()}
    self.rows[title].update(named)


def _look_at_data(config: Settings) -> None:
  """Raises what is wrong with the records of any network, before the first is trained."""
  seen = []
  for name in config.networks:
    if (own := config.network[name].data) not in seen:
      seen.append(own)
      for split in ('train', 'test'):
        harness_data.load(own, split)


def _text(metrics: Mapping[str, float]) -> str:
  return ', '.join(f'{name} {value:.4g}' for name, value in metrics.items())


def draw(
  config: Settings, rows: list[dict[str, Any]], reports: Mapping[tuple, Any], workdir: Any
) -> None:
  """Draws accuracy over bits and the errors of all blocks at the lowest bit-width."""
  kinds = {name: config.network[name].measure for name in config.networks}
  title = pictures.title(config)
  rows = [item for item in rows if not config.pictured or item['name'] in config.pictured]
  size = {'size': (4.5 * len(kinds), 3.6), 'squeeze': False}
  with pictures.drawn(workdir / 'accuracy_over_bits.png', 1, len(kinds), **size) as axes:
    axes[0, 0].set_ylabel(' or '.join(dict.fromkeys(kinds.values())))
    width = 0.8 / len(rows)
    for axis, (name, kind) in zip(axes[0], kinds.items(), strict=True):
      for i, item in enumerate(rows):
        values = [item['metrics'].get(f'{name}_{bits}_{kind}', np.nan) for bits in config.bits]
        axis.bar(np.arange(len(values)) + i * width, values, width, label=item['name'])
      axis.set_xticks(np.arange(len(config.bits)) + 0.4 - width / 2, config.bits)
      axis.set_title(f'{name}: {kind}')
      if kind == 'perplexity':
        axis.set_yscale('log')
    _finish(axes, title)
  with pictures.drawn(workdir / 'block_errors.png', 1, len(kinds), **size) as axes:
    axes[0, 0].set_ylabel('mean squared error on calibration data')
    lowest = config.bits[-1]
    for axis, name in zip(axes[0], kinds, strict=True):
      for item in rows:
        if (report := reports.get((name, lowest, item['name']))) is not None:
          before = f'before {item["name"]}'
          axis.plot(report.error_before, ':', marker='o', color='gray', label=before)
          axis.plot(report.error_after, '-', marker='o', label=f'after {item["name"]}')
      axis.set_title(f'{name} at {lowest}')
      axis.set_xlabel('compensated module')
      axis.set_yscale('log')
    _finish(axes, title)


def _finish(axes: Any, title: str) -> None:
  axes[0, 0].figure.suptitle(title)
  for axis in axes[0]:
    axis.grid(alpha=0.3, axis='y')
  if axes[0, -1].get_legend_handles_labels()[0]:
    axes[0, -1].legend(frameon=False, fontsize=8)
