"""Networks that are pruned to a share of their operations by a score of every channel, and quantized."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.harness.networks import Loaded, Network
from experiments.harness.runs import Variables
from jaxlab import compression, models, quantizers
from jaxlab.compression import Plan

Array = jax.Array


def matching(patterns: Collection[str], groups: Sequence[str]) -> list[str]:
  """Returns the groups that a pattern of `patterns` matches as a whole.

  Raises:
    ValueError: for a pattern that matches none.
  """
  for pattern in patterns:
    if not any(re.fullmatch(pattern, name) for name in groups):
      raise ValueError(f'no group matches {pattern!r}; groups: {", ".join(list(groups)[:6])}, ...')
  return [name for name in groups if any(re.fullmatch(own, name) for own in patterns)]


def operations(network: Network, model: nn.Module) -> int:
  """Returns the multiply-accumulates of an image of the network's data."""
  image = jax.ShapeDtypeStruct((1, *network.data.view), jnp.float32)
  return compression.multiply_accumulates(model, None, image)


def pruned(
  network: Network,
  model: nn.Module,
  scores: Mapping[str, np.ndarray],
  share: float,
  *,
  min_ratio: float,
  protected: Collection[str] = (),
) -> Plan:
  """Returns the plan that leaves at most a share of the operations: the channels of the highest scores.

  Args:
    network: says what an image is.
    model: the whole network.
    scores: of each channel, by group.
    share: of the multiply-accumulates.
    min_ratio: see `compression.global_ranking`.
    protected: patterns of groups that stay whole.

  Raises:
    ValueError: if the share cannot be reached, or a pattern matches no group.
  """
  stay = matching(protected, list(compression.structure(model).groups))
  scores = {name: own for name, own in scores.items() if name not in stay}
  options = {'min_ratio': min_ratio}

  def cost(keep: Mapping[str, np.ndarray]) -> float:
    return operations(network, compression.sliced_model(model, compression.plan(model, keep)))

  count = compression.search_num_remove(scores, cost, share * operations(network, model), **options)
  return compression.plan(model, compression.global_ranking(scores, count, **options))


def random_scores(model: nn.Module, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """Returns scores of all channels that say nothing."""
  return {name: rng.random(size) for name, size in compression.structure(model).sizes.items()}


def quantized_accuracy(
  net: Loaded, model: nn.Module, variables: Variables, inputs: Array, bits: str
) -> float:
  """Returns the test accuracy in percent of a network whose kernels and inputs are quantized after training.

  Args:
    net: whose test images they are.
    model: the network.
    variables: its variables, in float.
    inputs: that ranges are measured on.
    bits: such as '8w8a'; stem and classifier have 8.
  """
  rules = quantizers.edge_rules(*quantizers.parse_bits(bits), edges=models.anatomy(model))
  found = quantizers.percentile_ptq(model, variables, [inputs], rules)
  own = dataclasses.replace(net, model=model, variables=variables)
  return own.score(*found.unbind())['accuracy']
