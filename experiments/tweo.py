"""TWEO: Transformers Without Extreme Outliers (Liang et al., CVPR 2026, arXiv 2511.23225).

One term in the loss, a scaled fourth power of what every block hands on, keeps the residual stream small:

  loss = task + weight(t) 1/L sum_l mean((|A_l| / tau)^4)

Claim: peaks fall by a multiple at equal accuracy, so that the coarsest quantization works (one static number
a tensor, residual stream included), and training in 8-bit floats follows that in float. Outliers come from
colinear weights, not from data: the trained network has them on noise, too, one with random weights has none.

  python -m experiments.tweo
  python -m experiments.tweo --config=text
  python -m experiments.tweo --config=gpt2_xl --workdir=DIR
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn

from experiments.harness import launcher, networks, pictures, results, supervised
from experiments.harness.data import Tokens
from experiments.harness.networks import Loaded
from experiments.harness.runs import Run, Trained, Variables, say
from experiments.harness.settings import section
from experiments.harness.tasks import Task
from experiments.protocols import block_penalty, outlier_statistics, outliers
from experiments.protocols.block_penalty import Penalty
from experiments.protocols.outlier_statistics import Outlier
from experiments.protocols.outliers import Training
from jaxlab import data, evaluation, losses, quantizers
from jaxlab.evaluation import DataIndependence
from jaxlab.training import by_path, replace_by_gradient

Array = jax.Array

METRICS = (
  'tweo_loss',
  'relative_loss',
  r'(\d+w\d+a(_\w+)?_)?relative_perplexity',
  'loss_over_float',
  'float8_(accuracy|perplexity|bits_per_token)',
  'input_(peak|minimum|mean_abs)',
  'outlier_(value|linear|top_term|top_share|top_cosine)',
)


@dataclasses.dataclass(frozen=True)
class Float8:
  """Delayed scaling: how many past maxima a scale looks at, and its reserve in bits."""

  history: int = 16
  margin: float = 0.0

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.history < 1:
      yield f'history={self.history}: expected at least 1.'
    if not math.isfinite(self.margin):
      yield f'margin={self.margin}: expected a number of bits.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(outliers.Settings):
  """Settings of TWEO.

  Attributes:
    penalty: TWEO's term.
    float8: of the rows in 8-bit floats.
  """

  penalty: Penalty = section(Penalty)
  float8: Float8 = section(Float8)
  runs: tuple[str, ...] = ('plain', 'tweo')


def trainings(config: Settings, in_8_bits: Mapping[str, Any]) -> dict[str, Training]:
  """Returns the trainings with and without TWEO, each in float and, with these options, in 8-bit floats."""
  size = block_penalty.block_penalty(config.network, config.penalty, losses.tweo_loss)
  both = {'watched': {'tweo_loss': size}}
  tweo = {'loss': block_penalty.penalized(config.network, config.penalty, losses.tweo_loss)}
  float8 = {'options': in_8_bits, 'judged': in_float}
  own = {'penalty': config.penalty}, {'float8': config.float8}
  kinds = {
    'plain': Training('plain', 'baseline'),
    'tweo': Training('TWEO', 'method', **tweo, decides=own[0]),
    'plain_float8': Training('plain, float8', 'baseline', **float8, decides=own[1]),
    'tweo_float8': Training('TWEO, float8', 'method', **tweo, **float8, decides=own[0] | own[1]),
  }
  return {name: kind._replace(**both) for name, kind in kinds.items()}


def table(config: Settings) -> dict[str, Training]:
  """Returns the trainings that `config.runs` may name."""
  wanted = any(name.endswith('_float8') for name in config.runs)
  return trainings(config, float8_options(config) if wanted else {})


def float8_options(config: Settings) -> dict[str, Any]:
  """Returns what makes a training one in 8-bit floats: layers, norms and head, with scales that go along."""
  state, probes = scales(config.model, config.network.task, config.float8.history)

  def optimizer(schedule: optax.Schedule) -> optax.GradientTransformation:
    own = config.network.recipe.optimizer.make(schedule)
    return by_path([(quantizers.PROBES, replace_by_gradient()), ('.*', own)])

  return {
    'prepare': lambda params: quantizers.merge_probes(params, probes),
    'collections': {'float8': state},
    'hooks': quantizers.float8_hooks(config.float8.margin),
    'optimizer': optimizer,
  }


@functools.lru_cache
def scales(model: nn.Module, task: Task, history: int) -> tuple[Variables, Variables]:
  """Returns scales before the first step, and probes; see `quantizers.init_float8`."""
  variables = supervised.abstract_variables(model, task)
  inputs = supervised.abstract_inputs(task)
  return quantizers.init_float8(model, variables, inputs, history=history)


def in_float(variables: Variables) -> Variables:
  """Returns the variables of the model itself out of those of a training in 8-bit floats."""
  own = {name: tree for name, tree in variables.items() if name != 'float8'}
  return {**own, 'params': quantizers.split_probes(own['params'])}


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from block_penalty.check(config.penalty, losses.tweo_loss)
  yield from outliers.check(
    config, trainings(config, {}), METRICS, (r'.* on noise', 'random weights')
  )


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings of `config.runs`."""
  del facts
  return outliers.programs(config, table(config))


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains with and without TWEO, quantizes, and looks for the origin of outliers."""
  found = outliers.compare(config, workdir, table(config), in_float8)
  rows = outliers.table_rows(found)
  add_ratios(rows)
  origins = {
    own.training.title: origin(own.network)
    for own in (found[name] for name in ('plain', 'tweo') if name in found)
  }
  for title, own in origins.items():
    of_title = next(item for item in rows if item['name'] == title)
    of_title['metrics'] |= own.metrics
    rows.append(results.row(f'{title} on noise', 'reference', largest(own.peaks.noise)))
  if origins:
    drawn = next(iter(origins.values())).peaks.drawn
    rows.append(results.row('random weights', 'reference', largest(drawn)))
    draw(config, origins, workdir / 'origin.png')
  measure = config.network.measure
  further = ('loss', 'loss_over_float', f'float8_{measure}', 'tweo_loss', 'relative_perplexity')
  further += ('input_peak', 'input_minimum', 'input_mean_abs')
  further += tuple(f'outlier_{name}' for name in Origin.PARTS)
  return results.results(config, rows, outliers.shown(config, *further), outliers.UNITS[measure])


def add_ratios(rows: list[dict[str, Any]]) -> None:
  """Adds perplexities and bits of a token over those of plain training, and losses over those in float.

  `loss_over_float` is the loss of the last steps of a training in 8-bit floats over that of the same one in
  float.
  """
  plain = next((item['metrics'] for item in rows if item['name'] == 'plain'), {})
  named = [name for name in plain if name.endswith('perplexity')]
  ratios = {name.replace('perplexity', 'relative_perplexity'): name for name in named}
  outliers.add_ratios(rows, {**ratios, 'relative_loss': 'bits_per_token'})
  for title in ('plain', 'TWEO'):
    pair = [item for item in rows if item['name'] in (title, f'{title}, float8')]
    if len(pair) == 2:
      outliers.add_ratios(pair, {'loss_over_float': 'loss'}, title)


def in_float8(network: Loaded, trained: Trained) -> dict[str, float]:
  """Returns how good a network that was trained in 8-bit floats is in them."""
  if 'float8' not in trained.variables:
    return {}
  found = network.score(trained.variables, quantizers.float8_hooks(network.config.float8.margin))
  return {f'float8_{name}': value for name, value in outliers.scores(found).items()}


class Origin(NamedTuple):
  """Where a network's outliers come from.

  Attributes:
    peaks: of every block, on training inputs, with random weights, and on noise, averaged over inputs.
    outlier: the largest output of any MLP on training inputs.
  """

  peaks: DataIndependence
  outlier: Outlier
  PARTS = ('value', 'linear', 'top_term', 'top_share', 'top_cosine')

  @property
  def metrics(self) -> dict[str, float]:
    """Metrics of the network's row."""
    parts = self.outlier.parts
    own = {
      'value': abs(self.outlier.value),
      'linear': abs(parts.linear),
      'top_term': abs(parts.top_term),
    }
    own |= {'top_share': parts.top_share, 'top_cosine': parts.cosines[np.abs(parts.terms).argmax()]}
    named = {f'outlier_{name}': float(value) for name, value in own.items()}
    return largest(self.peaks.trained) | named


def largest(found: evaluation.OutlierStatistics) -> dict[str, float]:
  """Returns the extremes of any block, each of one input and averaged over inputs; and its mean size."""
  return {
    'input_peak': float(found.peak.max()),
    'input_minimum': float(found.minimum.min()),
    'input_mean_abs': float(found.mean_abs.max()),
  }


def origin(network: Loaded) -> Origin:
  """Returns where the outliers of a network come from, by one batch of training inputs."""
  config, model = network.config, network.model
  (x,) = network.calibration(config.calibration.batch_size, config.calibration.batch_size)
  keys = jax.random.split(jax.random.key(config.seed))
  drawn = dict(jax.jit(model.init)(keys[0], x))
  drawn['params'] = networks.prepared(network.network, drawn['params'])
  outputs = functools.partial(outlier_statistics.outputs_of_blocks, model)
  fake = noise(network, x.shape, keys[1])
  peaks = evaluation.data_independence(outputs, network.variables, drawn, x, fake)
  found = outlier_statistics.largest_outlier(network, x)
  say(f'the largest output of an MLP: {found}')
  return Origin(jax.device_get(peaks), found)


def noise(network: Loaded, shape: tuple[int, ...], key: Array) -> Array:
  """Returns random inputs: uniform tokens of the vocabulary, or uniform pixels, normalized as images are."""
  own = network.network.data
  if isinstance(own, Tokens):
    # What fills a table up is no token.
    size = network.model.vocab_size
    return jax.random.randint(key, shape, 0, min(size, own.train_options.get('vocab_size', size)))
  return data.normalize(jax.random.uniform(key, shape), own.mean, own.std)


def draw(config: Settings, found: Mapping[str, Origin], path: Any) -> None:
  """Draws the test of data independence, a panel a network, and the terms of the largest outliers."""
  with pictures.drawn(path, 1, len(found) + 1, size=(4.2 * (len(found) + 1), 3.6)) as axes:
    for axis, (title, own) in zip(axes, found.items()):
      inputs = 'random weights', 'noise', 'training inputs'
      peaks = own.peaks.drawn.peak, own.peaks.noise.peak, own.peaks.trained.peak
      for label, values in zip(inputs, peaks):
        axis.plot(1 + np.arange(len(values)), values, marker='o', label=label)
      axis.set(title=title, xlabel='block', ylabel='peak, mean over inputs', yscale='log')
      axis.xaxis.get_major_locator().set_params(integer=True)
      axis.legend(frameon=False, fontsize=8)
    for title, own in found.items():
      terms = np.sort(np.abs(own.outlier.parts.terms))[::-1]
      label = f'{title}: {own.outlier.path}, channel {own.outlier.channel}'
      axes[-1].plot(1 + np.arange(len(terms)), terms, marker='.', label=label)
    axes[-1].set(title='largest outlier of an MLP', xlabel='singular direction', ylabel='its term')
    axes[-1].legend(frameon=False, fontsize=8)
    axes[-1].figure.suptitle(pictures.title(config))


if __name__ == '__main__':
  launcher.main('tweo')
