"""How good networks are quantized by the largest magnitude, coarsely on purpose: schemes, rules and scores.

A scheme is `'stream'`: kernels and activations with one static number a tensor, the residual stream
quantized, too. Or it says by words, joined by `_` in this order, what is otherwise:

- `'channel'`: a scale for each output channel of a kernel; `'token'`: further one for each token of an
  activation, found when it is there;
- `'linear'`: the inputs of layers alone are quantized, the residual stream stays in float;
- `'smooth'`: behind SmoothQuant (`quantizers.smooth_norms`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments.harness import pictures
from experiments.harness.networks import Loaded
from experiments.harness.sections import Experiment
from experiments.harness.settings import found_by
from jaxlab import models, quantizers
from jaxlab.models import Anatomy, any_of
from jaxlab.quantizers import Rule, parse_bits

Array = jax.Array

FLOAT = 16
WORDS = ('channel', 'token', 'linear', 'smooth')
SCHEMES = ('stream', 'linear', 'channel', 'token')


class Scheme(NamedTuple):
  """What a scheme's name says.

  Attributes:
    kernels: scales of kernels.
    inputs: scales of activations.
    stream: whether the residual stream is quantized.
    smooth: whether the network is smoothed before.
  """

  kernels: Literal['tensor', 'channel']
  inputs: Literal['tensor', 'token']
  stream: bool
  smooth: bool


def parse_scheme(name: str) -> Scheme:
  """Returns what a scheme's name says; raises ValueError for one that does not exist.

  >>> parse_scheme('token_linear')
  Scheme(kernels='channel', inputs='token', stream=False, smooth=False)
  """
  said = [] if name == 'stream' else name.split('_')
  if said != [word for word in WORDS if word in said] or {'channel', 'token'} <= set(said):
    raise ValueError(
      f"scheme {name!r} is neither 'stream' nor words of {', '.join(WORDS)} in this order, joined by '_', "
      'with one of channel and token.'
    )
  fine, token = {'channel', 'token'} & set(said), 'token' in said
  return Scheme(
    'channel' if fine else 'tensor', 'token' if token else 'tensor', 'linear' not in said,
    'smooth' in said,
  )  # fmt: skip


def quantization_rules(parts: Anatomy, bits: str, scheme: str) -> list[Rule]:
  """Returns the rules of `quantizers.absmax_ptq` for a bit-width such as '4w4a' and the name of a scheme.

  Raises:
    ValueError: for bits outside of 2 to 8 that are not 16, or a scheme that does not exist.
  """
  own, widths = parse_scheme(scheme), parse_bits(bits)
  if wrong := [width for width in widths if not 2 <= width <= 8 and width != FLOAT]:
    raise ValueError(f'{bits!r}: {wrong[0]} bits are neither 2 to 8 nor {FLOAT} for float.')
  weights, inputs = (None if width == FLOAT else width for width in widths)
  rules = []
  if weights is not None:
    rules.append(Rule('.*', 'kernel', weights, own.kernels))
    rules += [Rule(any_of((parts.tied,)), 'embedding', weights, own.kernels)] if parts.tied else []
  if inputs is not None:
    # The patches that a convolution reads are no tokens.
    rules += [Rule(any_of(parts.stem), 'input', inputs, 'tensor')] if parts.stem else []
    rules.append(Rule('.*', 'input', inputs, own.inputs))
    if own.stream and parts.stream:
      rules.append(Rule(any_of(parts.stream), 'output', inputs, own.inputs))
  return rules


def check(bits: Sequence[str], schemes: Sequence[str], parts: Anatomy) -> list[str]:
  """Returns what is wrong with bit-widths and schemes for a network."""
  found = []
  for name, values in (('bits', bits), ('schemes', schemes)):
    if len(set(values)) < len(values):
      found.append(f'{name}={",".join(values)}: each may be there once.')
  for width in bits:
    found += found_by('bits', quantization_rules, parts, width, 'stream')
  for name in schemes:
    found += found_by('schemes', parse_scheme, name)
  smooth = [name for name in schemes if name.split('_')[-1] == 'smooth']
  if smooth and not any(set(norm.readers) - set(parts.head) for norm in parts.norms):
    found.append(
      f'schemes: {smooth[0]!r} needs a norm that layers alone read; the network has none.'
    )
  return found


def metric(measure: str, bits: str = '', scheme: str = 'stream') -> str:
  """Returns the name of a metric: `accuracy`, `4w4a_accuracy`, `4w4a_linear_accuracy`."""
  return '_'.join(part for part in (bits, '' if scheme == 'stream' else scheme, measure) if part)


def metric_pattern(measure: str) -> str:
  """Returns the regular expression of the names of all metrics under quantization."""
  return rf'\d+w\d+a(_channel|_token)?(_linear)?(_smooth)?_{measure}'


class Prepared(NamedTuple):
  """What all bit-widths of a network share.

  Attributes:
    variables: in float.
    seen: the largest magnitudes of its activations.
  """

  variables: Mapping[str, Any]
  seen: Mapping[str, Array]


def prepare(network: Loaded, batches: Sequence[Array], smooth: bool = False) -> Prepared:
  """Returns a network, smoothed or as it is, with its one calibration."""
  model, variables = network.model, network.variables
  if smooth:
    variables = quantizers.smooth_norms(model, variables, batches)
  parts = models.anatomy(model)
  inputs = (*parts.layers, *(() if parts.tied is None else (parts.tied,)))
  seen = quantizers.largest_magnitudes(model, variables, batches, inputs, parts.stream)
  return Prepared(variables, seen)


def quantized_scores(
  network: Loaded,
  bits: Sequence[str],
  schemes: Sequence[str],
  batches: Sequence[Array],
  scores: Callable[[Mapping[str, float]], Mapping[str, float]],
) -> dict[str, float]:
  """Returns how good a network is at each bit-width under each scheme, by `metric`.

  Args:
    network: in float.
    bits: bit-widths.
    schemes: by name.
    batches: calibration inputs.
    scores: the metrics of what `Loaded.score` returns.
  """
  parts, found = models.anatomy(network.model), {}
  prepared: dict[bool, Prepared] = {}
  for scheme in schemes:
    smooth = parse_scheme(scheme).smooth
    if smooth not in prepared:
      prepared[smooth] = prepare(network, batches, smooth)
    variables, seen = prepared[smooth]
    for width in bits:
      if parse_bits(width)[0] == FLOAT and _without_channels(scheme) in schemes:
        continue  # there are no kernels whose scales could differ
      rules = quantization_rules(parts, width, scheme)
      quantized = quantizers.absmax_ptq(network.model, variables, batches[0], rules, seen=seen)
      judged = scores(network.score(*quantized.unbind()))
      found |= {metric(name, width, scheme): value for name, value in judged.items()}
  return found


def _without_channels(scheme: str) -> str:
  """Returns the scheme that differs from one by channel in the scales of kernels alone, else nothing."""
  if not scheme.startswith('channel'):
    return ''
  return scheme.removeprefix('channel').removeprefix('_') or 'stream'


def draw_bits(
  config: Experiment,
  bits: Sequence[str],
  schemes: Sequence[str],
  rows: Mapping[str, Mapping[str, float]],
  measure: str,
  path: Any,
) -> None:
  """Draws the measure over bits, a panel a scheme; `rows` are metrics by title."""
  options = {'size': (4.2 * len(schemes), 3.6), 'squeeze': False, 'sharey': True}
  with pictures.drawn(path, 1, max(1, len(schemes)), **options) as axes:
    for axis, scheme in zip(axes[0], schemes):
      for title, own in rows.items():
        names = {width: metric(measure, width, scheme) for width in bits}
        points = {width: own[name] for width, name in names.items() if name in own}
        values = [own[measure], *points.values()]
        axis.plot(np.arange(len(values)), values, marker='o', label=title)
        axis.set_xticks(np.arange(len(values)), ['float', *points])
      axis.set(title=scheme, xlabel='bits')
      axis.set_yscale('log' if measure == 'perplexity' else 'linear')
    axes[0, 0].set_ylabel(measure)
    axes[0, -1].legend(frameon=False, fontsize=8)
    axes[0, 0].figure.suptitle(pictures.title(config))
