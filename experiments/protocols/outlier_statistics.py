"""How large activations are, in training and of the trained network, and which aligned weights make them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import pictures
from experiments.harness.networks import Loaded
from experiments.harness.runs import Trained, Variables
from experiments.harness.sections import Experiment
from experiments.harness.supervised import Seen
from experiments.harness.tasks import Task
from jaxlab import evaluation, models
from jaxlab.evaluation import ChannelColinearity, OutlierStatistics
from jaxlab.models import Anatomy, any_of
from jaxlab.models.activations import GELUS
from jaxlab.training import map_batches

Array = jax.Array
Watched = Callable[[Seen], Array]

PAIRS = ('mlp', 'vo')


def block_peaks(parts: Anatomy) -> dict[str, Watched]:
  """Returns what is watched in training: `max |A|` of each block, as `peak_00` and so on."""

  def peak(index: int, seen: Seen) -> Array:
    return jnp.max(jnp.abs(models.block_outputs(seen.captured, parts)[index]))

  return {f'peak_{i:02d}': functools.partial(peak, i) for i in range(len(parts.blocks))}


def of_training(trained: Trained, watched: Sequence[str] = ()) -> dict[str, float]:
  """Returns the largest activation of any step, `training_peak`, and means over the last tenth of the lines.

  These are `loss` and what else was `watched`, by its name.
  """
  peaks = [float(value) for name, value in trained.state.extra.items() if name.startswith('peak_')]
  lines = [line for line in trained.history if 'loss' in line]
  last = lines[-max(1, len(lines) // 10) :]
  ends = {name: float(np.mean([line[name] for line in last])) for name in ('loss', *watched)}
  return {'training_peak': max(peaks), **ends}


@functools.partial(jax.jit, static_argnames=('model', 'task'))
def statistics(
  variables: Variables, batch: Mapping[str, Array], *, model: nn.Module, task: Task
) -> OutlierStatistics:
  """Returns the statistics `[batch, blocks]` of each record's block outputs."""
  return jax.vmap(evaluation.outlier_statistics)(
    list(outputs_of_blocks(model, variables, task.inputs(batch)))
  )


@functools.partial(jax.jit, static_argnums=0)
def outputs_of_blocks(model: nn.Module, variables: Variables, x: Any) -> Any:
  """Returns the outputs of all blocks for a batch of inputs, in evaluation mode."""
  parts = models.anatomy(model)
  _, captured = models.capture(model, variables, [any_of(parts.block_paths)], x)
  return models.block_outputs(captured, parts)


def over_records(network: Loaded) -> OutlierStatistics:
  """Returns statistics of the blocks over the test records: extremes of extremes, means of the others.

  The kurtosis is that of one record, averaged over records.
  """
  config, own = network.config, network.network
  fn = functools.partial(statistics, network.variables, model=network.model, task=own.task)
  reading = harness_data.reading(own.data, 'test')
  options = {'batch_size': config.eval_batch_size, 'mesh': config.mesh.make(), **reading}
  each = map_batches(fn, network.test, **options)
  return OutlierStatistics(
    peak=each.peak.max(0),
    maximum=each.maximum.max(0),
    minimum=each.minimum.min(0),
    mean_abs=each.mean_abs.mean(0),
    kurtosis=each.kurtosis.mean(0),
  )


def alignment(network: Loaded) -> dict[str, float]:
  """Returns the mean index of the pairs of each kind, a pair a head: `colinearity_mlp`, `colinearity_vo`."""
  found = {}
  for kind in PAIRS:
    pairs = models.weight_pairs(network.model, (kind,))
    index = [evaluation.colinearity_index(*pair(network.variables['params'])) for pair in pairs]
    found[f'colinearity_{kind}'] = float(np.mean([np.mean(value) for value in index]))
  return found


class Outlier(NamedTuple):
  """The largest output of any MLP.

  Attributes:
    value: of it.
    parts: the singular directions of the MLP's first matrix that make it.
    path: of the MLP.
    token: index of the input and of the token in it.
    channel: of the output.
  """

  value: float
  parts: ChannelColinearity
  path: str
  token: tuple[int, ...]
  channel: int

  def __str__(self) -> str:
    """Returns a line that says which one it is."""
    where = f'channel {self.channel} of token {self.token[-1]}'
    return f'{self.value:.4g} in {where} of input {self.token[0]} behind {self.path}'


def largest_outlier(network: Loaded, x: Array) -> Outlier:
  """Returns the largest output of any block's MLP on the inputs `x`, and what makes it."""
  parts, params = models.anatomy(network.model), network.variables['params']
  mlps = [b for block in parts.blocks for b in block.branches if b.kind == 'mlp']
  norms = [n.path for mlp in mlps for n in parts.norms if mlp.layers[0] in n.readers]
  wanted = [any_of([*norms, *(mlp.output for mlp in mlps)])]
  capture = jax.jit(lambda variables, x: models.capture(network.model, variables, wanted, x)[1])
  captured = capture(network.variables, x)
  sizes = [jnp.abs(captured[mlp.output]) for mlp in mlps]
  index = int(np.argmax([float(size.max()) for size in sizes]))
  mlp, norm = mlps[index], norms[index]
  *token, channel = np.unravel_index(int(sizes[index].argmax()), sizes[index].shape)
  kernels = [at(params, f'{layer}/kernel') for layer in mlp.layers]
  activation = GELUS[getattr(network.model, 'activation', 'gelu')]
  found = evaluation.channel_colinearity(
    *kernels, captured[norm][tuple(token)], channel, activation=activation
  )
  value = float(captured[mlp.output][(*token, channel)])
  place = tuple(int(index) for index in token)
  return Outlier(value, jax.device_get(found), mlp.output, place, int(channel))


def at(tree: Mapping[str, Any], path: str) -> Any:
  """Returns what a tree holds at a path."""
  return functools.reduce(lambda own, name: own[name], path.split('/'), tree)


def draw_peaks(
  config: Experiment,
  blocks: Mapping[str, OutlierStatistics],
  histories: Mapping[str, Sequence[Mapping[str, Any]]],
  path: Any,
) -> None:
  """Draws `max |A|` over blocks, of trained networks by title, and over training, of the largest block."""
  with pictures.drawn(path, 1, 2, size=(10, 3.6)) as (at_end, steps):
    for title, own in blocks.items():
      at_end.plot(1 + np.arange(len(own.peak)), own.peak, marker='o')
      lines = [line for line in histories[title] if 'peak_00' in line]
      largest = [max(v for k, v in line.items() if k.startswith('peak_')) for line in lines]
      steps.plot([line['step'] for line in lines], largest, label=title)
    at_end.set(xlabel='block', ylabel='largest activation at the end', yscale='log')
    at_end.xaxis.get_major_locator().set_params(integer=True)
    steps.set(xlabel='step', ylabel='largest activation in training', yscale='log')
    steps.legend(frameon=False, fontsize=8)
    at_end.figure.suptitle(pictures.title(config))
