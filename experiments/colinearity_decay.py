"""Colinearity Decay (Tong et al. 2026, arXiv 2605.01330): training that leaves no outliers to quantize.

An activation is huge where a row of one matrix is aligned with a strong direction of the matrix before it. CD
decays this alignment in the weights, beside the loss, as AdamW decays their size:

  A <- A - eta lam dR/dA,  B <- B - eta lam dR/dB,  R(A, B) = |B A|_F^2 / 2

for the consecutive matrices of every block. Claim: networks quantize better, by several pipelines, at equal
accuracy in float and at no cost later. The abstract names pairs, decoupling and aim; formula and coefficient
are this library's.

  python -m experiments.colinearity_decay
  python -m experiments.colinearity_decay --config=combinations
  python -m experiments.colinearity_decay --config=imagenet_deit_small --workdir=DIR
"""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from experiments.harness import launcher, results
from experiments.harness.networks import Loaded
from experiments.harness.runs import Run, Trained
from experiments.harness.settings import found_by, section
from experiments.protocols import block_penalty, outliers, pipelines
from experiments.protocols.block_penalty import Penalty
from experiments.protocols.colinearity import Decay, decayed, pairs_of
from experiments.protocols.outliers import Training
from experiments.protocols.pipelines import Pipeline
from experiments.protocols.quantized_networks import Fitting, Method
from jaxlab import evaluation, losses, models
from jaxlab.quantizers import compensation

PyTree = Any

RATIOS = ('colinearity', 'gain', 'peak')
ALIGNMENT = ('colinearity', 'gain', 'gain_over_median')

# A pipeline is '<quantizer>' or '<quantizer> + <compensation>'; compensations as their papers fit them.
QUANTIZERS = ('AbsMax', 'SmoothQuant', 'percentiles', 'RepQ')
COMPENSATIONS = {
  'QwT': Method('reference', compensation.QwT()),
  'QwT-v2': Method('reference', compensation.QwTv2(), Fitting(dtype='float32'), transitions=True),
  'NBC': Method('reference', compensation.NBC()),
}


@dataclasses.dataclass(frozen=True)
class Spectral:
  """S2D's penalty, in the loss: `weight` times `losses.top_singular_loss` of every matrix of the blocks."""

  weight: float = 5e-4
  power: float = 2
  count: int = 3

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not 0 <= self.weight < math.inf:
      yield f'weight={self.weight}: expected a number of at least 0.'
    matrix = jnp.ones((1, 1))
    yield from found_by('power, count', losses.top_singular_loss, matrix, self.power, self.count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(outliers.Settings):
  """Settings of Colinearity Decay.

  Attributes:
    decay: CD.
    variants: further rows, by name.
    weight_decay: of the row that decays the weights' size instead.
    penalty: of the row with TWEO's term.
    spectral: of the row that decays the spectrum of single matrices.
    pipelines: further ones that all trainings go through, such as 'RepQ + NBC'.
    ranges: calibration inputs, the first ones, that ranges by a search are of.
  """

  decay: Decay = section(Decay)
  variants: dict[str, Decay] = dataclasses.field(default_factory=dict)
  weight_decay: float = 0.1
  penalty: Penalty = section(Penalty)
  spectral: Spectral = section(Spectral)
  pipelines: tuple[str, ...] = ()
  ranges: int = 64
  runs: tuple[str, ...] = ('plain', 'cd')


def table(config: Settings) -> dict[str, Training]:
  """Returns the trainings: plain, with CD, and with what else keeps weights or activations small."""
  named = {'cd': config.decay, **config.variants}
  rows = {
    'plain': Training('plain', 'baseline'),
    'weight_decay': Training(
      'weight decay', 'reference', options={'optimizer': functools.partial(heavier, config)},
      decides={'weight_decay': config.weight_decay},
    ),
    'tweo': Training(
      'TWEO', 'reference', block_penalty.penalized(config.network, config.penalty, losses.tweo_loss),
      decides={'penalty': config.penalty},
    ),
    's2d': Training(
      'S2D', 'reference', options={'optimizer': functools.partial(flatter, config)},
      decides={'spectral': config.spectral},
    ),
  }  # fmt: skip
  for name, own in named.items():
    title, role = ('CD', 'method') if name == 'cd' else (name, 'reference')
    options = {'optimizer': functools.partial(decayed, config.network, own)}
    rows[name] = Training(title, role, options=options, decides={'decay': own})
  return rows


def heavier(config: Settings, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Returns the recipe's optimizer with more weight decay."""
  own = dataclasses.replace(config.network.recipe.optimizer, weight_decay=config.weight_decay)
  return own.make(schedule)


def flatter(config: Settings, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Returns the recipe's optimizer for the loss with S2D's penalty."""
  own = config.spectral
  layers = [path for block in models.anatomy(config.model).blocks for path in block.layers]

  def penalty(params: PyTree) -> jax.Array:
    flat = traverse_util.flatten_dict(params, sep='/')
    kernels = [flat[f'{path}/kernel'] for path in layers]
    return own.weight * sum(
      losses.top_singular_loss(kernel, own.power, own.count).sum() for kernel in kernels
    )

  def add(updates: PyTree, params: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, updates, jax.grad(penalty)(params))

  return optax.chain(optax.stateless(add), config.network.recipe.optimizer.make(schedule))


def pipeline(config: Settings, name: str) -> Pipeline:
  """Returns the pipeline of a name; raises ValueError for one that does not exist."""
  quantizer, _, behind = name.partition(' + ')
  if quantizer not in QUANTIZERS or (behind not in COMPENSATIONS and name != quantizer):
    raise ValueError(
      f'{name!r} is no pipeline: expected one of {", ".join(QUANTIZERS)}, perhaps with " + " and one of '
      f'{", ".join(COMPENSATIONS)}.'
    )
  return Pipeline(quantizers_of(config.ranges)[quantizer], COMPENSATIONS.get(behind))


@functools.cache
def quantizers_of(ranges: int) -> dict[str, Any]:
  """Returns the quantizers by name, the same ones for the same number of inputs of a search."""
  found = (
    pipelines.absmax,
    functools.partial(pipelines.absmax, smooth=True),
    functools.partial(pipelines.percentiles, count=ranges),
    functools.partial(pipelines.repq, count=ranges),
  )
  return dict(zip(QUANTIZERS, found, strict=True))


def check(config: Settings) -> Iterator[str]:
  """Yields what is wrong with the settings."""
  yield from block_penalty.check(config.penalty, losses.tweo_loss)
  if not 0 <= config.weight_decay < math.inf:
    yield f'weight_decay={config.weight_decay}: expected a number of at least 0.'
  for name, own in {'decay': config.decay, **config.variants}.items():
    yield from found_by(name, decayed, config.network, own, optax.constant_schedule(0.1))
  taken = table(dataclasses.replace(config, variants={}))
  taken = {*taken, *(own.title for own in taken.values())}
  for name in config.variants:
    if name in taken or not re.fullmatch(r'\w[^/\\]*', name):
      yield (
        f'variants: {name!r} names row and folder: expected no slash, a letter or digit in front, and '
        f'none of {", ".join(sorted(taken))}.'
      )
  for name in config.pipelines:
    yield from found_by('pipelines', pipeline, config, name)
  if len(set(config.pipelines)) < len(config.pipelines):
    yield f'pipelines={", ".join(config.pipelines)}: each may be there once.'
  if not 1 <= config.ranges <= config.calibration.count:
    yield f'ranges={config.ranges}: expected 1 to calibration.count={config.calibration.count}.'
  widths = '|'.join(map(re.escape, config.bits))
  behind = rf'(absmax|smoothquant|percentiles|repq)(_\w+)?_({widths})_{config.network.measure}'
  further = (*ALIGNMENT, *(f'{name}_ratio' for name in RATIOS), behind)
  yield from outliers.check(config, table(config), further)


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings of `config.runs`."""
  del facts
  return outliers.programs(config, table(config))


def measured(config: Settings, network: Loaded, trained: Trained) -> Mapping[str, float]:
  """Returns how aligned a network's weights are, and how good it is behind the pipelines.

  `colinearity`, the mean index of all pairs; `gain`, the largest of a channel of any of them, and
  `gain_over_median`, the largest of a channel over the median of its pair.
  """
  del trained
  pairs = [pair(network.variables['params']) for pair in pairs_of(config.network, config.decay)]
  gains = [np.asarray(evaluation.channel_gains(*pair)) for pair in pairs]
  found = {
    'colinearity': float(np.mean([evaluation.colinearity_index(*pair).mean() for pair in pairs])),
    'gain': float(max(own.max() for own in gains)),
    'gain_over_median': float(max((own.max(-1) / np.median(own, -1)).max() for own in gains)),
  }
  if config.pipelines:
    sizes, chosen = config.calibration, {n: pipeline(config, n) for n in config.pipelines}
    batches = network.calibration(sizes.count, sizes.batch_size)
    found |= pipelines.scores(network, chosen, config.bits, batches)
  return found


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains with and without CD, and compares weights, activations and quantized networks."""
  rows = outliers.table_rows(
    outliers.compare(config, workdir, table(config), functools.partial(measured, config))
  )
  outliers.add_ratios(rows, {f'{name}_ratio': name for name in RATIOS})
  measure = config.network.measure
  behind = [pipelines.metric(p, b, measure) for p in config.pipelines for b in config.bits]
  own = (*ALIGNMENT, *(f'{name}_ratio' for name in RATIOS), *behind)
  return results.results(config, rows, outliers.shown(config, *own))


if __name__ == '__main__':
  launcher.main('colinearity_decay')
