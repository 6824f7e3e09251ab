"""Post-training pipelines: how a float network is quantized, and what is fitted behind it.

So that accuracies can be compared, all quantize the same: kernels with a scale an output channel, inputs of
layers with a static scale a tensor, stem and classifier with 8 bits. Attention's own products, the residual
stream and a table that is the head's kernel, too, stay in float.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.harness.networks import Loaded
from experiments.protocols import absmax_evaluation, quantized_networks
from experiments.protocols.absmax_evaluation import FLOAT
from experiments.protocols.quantized_networks import Method
from jaxlab import models, quantizers
from jaxlab.models import any_of
from jaxlab.quantizers import Quantized, Rule, compensation, parse_bits, uniform_rules

Array = jax.Array
Quantizer = Callable[[str], Quantized]  # at a bit-width such as '4w4a'


class Pipeline(NamedTuple):
  """A pipeline.

  Attributes:
    prepare: `(network in float, calibration inputs) -> quantizer`; what all bit-widths share is done here.
    behind: the compensation that is fitted behind it; None: none.
  """

  prepare: Callable[[Loaded, Sequence[Array]], Quantizer]
  behind: Method | None = None


def rules(parts: models.Anatomy, bits: str) -> list[Rule]:
  """Returns the rules for a bit-width such as '4w4a'; 16 stands for float."""
  weights, inputs = (None if width == FLOAT else width for width in parse_bits(bits))
  found = []
  if parts.edges:
    found += uniform_rules(weights and 8, inputs=inputs and 8, path=any_of(parts.edges))
  found += uniform_rules(weights, inputs=inputs, path=any_of(parts.layers))
  by = {'kernel': 'channel'}
  return [dataclasses.replace(rule, granularity=by.get(rule.operand)) for rule in found]


def absmax(network: Loaded, batches: Sequence[Array], *, smooth: bool = False) -> Quantizer:
  """Returns the quantizer with the largest magnitudes for ranges; if `smooth`, behind SmoothQuant."""
  model = network.model
  variables, seen = absmax_evaluation.prepare(network, batches, smooth)

  def quantize(bits: str) -> Quantized:
    own = rules(models.anatomy(model), bits)
    return quantizers.absmax_ptq(model, variables, batches[0], own, seen=seen)

  return quantize


def percentiles(network: Loaded, batches: Sequence[Array], *, count: int) -> Quantizer:
  """Returns the quantizer with ranges by the percentile search on the first `count` inputs."""
  x = first_inputs(batches, count)

  def quantize(bits: str) -> Quantized:
    own = rules(models.anatomy(network.model), bits)
    return quantizers.percentile_ptq(network.model, network.variables, x, own)

  return quantize


def repq(network: Loaded, batches: Sequence[Array], *, count: int) -> Quantizer:
  """Returns the quantizer of RepQ-ViT on the first `count` inputs."""
  x = first_inputs(batches, count)

  def quantize(bits: str) -> Quantized:
    own = rules(models.anatomy(network.model), bits)
    return quantizers.repq(network.model, network.variables, x, own)

  return quantize


def first_inputs(batches: Sequence[Array], count: int) -> Array:
  """Returns the first `count` inputs of batches, as one batch; raises ValueError if there are fewer."""
  enough = -(-count // len(batches[0]))
  if count > sum(map(len, batches)):
    raise ValueError(
      f'{count} inputs are more than the {sum(map(len, batches))} of the calibration.'
    )
  return jnp.concatenate(batches[:enough])[:count]


def metric(name: str, bits: str, measure: str) -> str:
  """Returns the name of a pipeline's metric, such as `absmax_bias_3w3a_accuracy` of 'AbsMax + bias'."""
  parts = name.lower().replace(' + ', '_').replace('-', '_')
  return f'{parts}_{bits}_{measure}'


def scores(
  network: Loaded,
  pipelines: Mapping[str, Pipeline],
  bits: Sequence[str],
  batches: Sequence[Array],
) -> dict[str, float]:
  """Returns how good a network is at each bit-width behind each pipeline, by `metric`.

  Args:
    network: in float.
    pipelines: by name; those with an equal `prepare` share what it makes.
    bits: bit-widths.
    batches: calibration inputs.
  """
  found: dict[str, float] = {}
  measure, compiled = network.network.measure, compensation.Programs()
  made = {own.prepare: own.prepare(network, batches) for own in pipelines.values()}
  for width in bits:
    bases: dict[Callable, Quantized] = {}
    for name, own in pipelines.items():
      if own.prepare not in bases:
        bases[own.prepare] = made[own.prepare](width)
      quantized = bases[own.prepare]
      if own.behind is not None:
        quantized = quantized_networks.compensate(
          network.network, quantized, batches, own.behind, compiled
        )
      found[metric(name, width, measure)] = network.score(*quantized.unbind())[measure]
  return found
