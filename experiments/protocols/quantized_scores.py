"""What networks that learn under quantization are worth: accuracy, unseen classes, distances of weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from experiments.harness import data as harness_data
from experiments.harness.data import Images
from experiments.protocols.feature_evaluation import Probe
from experiments.protocols.quantized_training import Trained, accuracy, in_float
from jaxlab.quantizers import Quantized

PyTree = Any

METRICS = ('accuracy', 'weight_distance', 'kernel_distance', 'latent_accuracy')


class Scores:
  """Measures networks: `scores(network, outputs) -> metrics`, accuracies in percent."""

  def __init__(self, nets: Trained, transfer: Mapping[str, Images], probe: Probe):
    """Opens the data.

    Args:
      nets: the float network, with which others are compared.
      transfer: data sets of classes that it never saw.
      probe: the linear classifier on their features.
    """
    self._nets, self._transfer, self._probe = nets, transfer, probe
    self._sources = {
      name: [harness_data.load(other, split) for split in ('train', 'test')]
      for name, other in transfer.items()
    }

  def __call__(self, network: Quantized, outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns `accuracy`, `transfer_*`, and `kernel_distance`, that of the kernels that it computes with.

    Args:
      network: whose.
      outputs: `Trained.outputs` of it.
    """
    nets = self._nets
    found = {
      'accuracy': accuracy(outputs),
      'kernel_distance': weight_distance(
        network.unbind()[0]['params'], nets.loaded.variables['params']
      ),
    }
    key = jax.random.key(nets.config.seed)
    for name, other in self._transfer.items():
      both = [nets.outputs(network, other, source) for source in self._sources[name]]
      bank, queries = ((own['features'], own['label']) for own in both)
      found[f'transfer_{name}'] = self._probe.accuracy(key, bank, queries, other.num_classes)
    return found

  def moved(self, network: Quantized) -> dict[str, float]:
    """Returns how far the float kernels went, and the accuracy of the network without its quantizers."""
    start = self._nets.loaded.variables
    latent = {part: network.variables[part] for part in start}
    return {
      'weight_distance': weight_distance(latent['params'], start['params']),
      'latent_accuracy': accuracy(self._nets.outputs(in_float(network.model, latent))),
    }


def weight_distance(params: PyTree, start: PyTree) -> float:
  """Returns `|W - W_0| / |W_0|` in percent, over all kernels together."""
  new, old = (traverse_util.flatten_dict(dict(tree), sep='/') for tree in (params, start))
  kernels = [path for path in old if path.rpartition('/')[2] == 'kernel']
  moved = sum(float(jnp.sum(jnp.square(new[path] - old[path]))) for path in kernels)
  size = sum(float(jnp.sum(jnp.square(old[path]))) for path in kernels)
  return 100 * float(np.sqrt(moved / size))
