"""Compares post-training quantization here with qwix's, on one trained network.

  python -m experiments.qwix_comparison --workdir=DIR [--network=vit] [--bits=8w8a,4w8a] [--repeats=5]

Rows: the network in float, ours fake-quantized, ours in integers, qwix's `PtqProvider` on the same module and
parameters. Patch embedding and classifier are at 8/8 bits in all. Ours has one static range a tensor for
activations (affine, from `calibration.ranges` inputs) and affine kernels; qwix measures a symmetric range for
every token as it runs, and quantizes attention's two products as integers, too. Its 4-bit kernels are
`jnp.int4` arrays, which take a byte a code in host memory; `packed` counts half a byte.

Times are those of the compiled network on one batch, the minimum over repeats that alternate between all
rows, as ratios to the float network.
"""

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from experiments import launcher, networks, post_training, training
from experiments.quantized_features import parse_bits
from experiments.tools.bench_loop import alternate
from jaxlab import models, quantizers
from jaxlab.quantizers.execution import integer_network
from jaxlab.training import map_batches

Array = jax.Array
PyTree = Any
Side = tuple[Callable[[PyTree, Array], Array], PyTree]


def compare(
  config: ConfigDict,
  folder: pathlib.Path,
  *,
  network: str = 'vit',
  bits: Sequence[str] = ('8w8a', '4w8a'),
  repeats: int = 5,
) -> dict[str, dict[str, float]]:
  """Returns `{row: {accuracy, bytes, packed, time}}`, `time` as a ratio to the float network.

  Args:
    config: of a post-training experiment, e.g. `qwt/embedded.py`.
    folder: where trained networks are kept.
    network: a section of `config.network`.
    bits: such as `'4w8a'`.
    repeats: of the timing.
  """
  for value in bits:
    quantizers.edge_policy(*parse_bits(value))
  own = networks.section(config, network)
  loaded = networks.load(config, network, folder)
  (ranges,) = loaded.calibration(config.calibration.ranges, config.calibration.ranges)
  test = training.load_data(own, 'test')
  sides = {'float': _side(loaded.model, loaded.variables)}
  for value in bits:
    fake = post_training.quantize(own, loaded.model, loaded.variables, ranges, value)
    integers = integer_network(fake)
    sides[f'{value} fake-quantized'] = _side(loaded.model, fake.variables, fake.hooks)
    sides[f'{value} integer'] = _side(loaded.model, integers.variables, integers.hooks)
    sides[f'{value} qwix'] = _side(*qwix_network(loaded, ranges, value))
  batch = jnp.concatenate([ranges] * (1 + own.eval_batch_size // len(ranges)))
  batch = batch[: own.eval_batch_size]

  def timed(side: Side) -> Callable[[], None]:
    run, variables = side
    jax.block_until_ready(run(variables, batch))
    return lambda: jax.block_until_ready(run(variables, batch))

  times = alternate({name: timed(side) for name, side in sides.items()}, repeats)
  return {
    name: {
      'accuracy': _accuracy(own, test, side),
      'bytes': float(quantizers.size_in_bytes(side[1])),
      'packed': float(_packed_bytes(side[1])),
      'time': times[name] / times['float'],
    }
    for name, side in sides.items()
  }


def qwix_network(network: networks.Network, x: Array, bits: str) -> tuple[nn.Module, PyTree]:
  """Returns qwix's module and variables at a bit-width such as `4w8a`, edges at 8/8.

  Raises:
    ValueError: for widths that are not qwix's types, int4 and int8.
  """
  import qwix

  widths = parse_bits(bits)
  if not set(widths) <= {4, 8}:
    raise ValueError(f'bits={bits!r}: qwix has integer types of 4 and 8 bits.')
  weights, activations = (jnp.dtype(f'int{width}') for width in widths)
  provider = qwix.PtqProvider(
    [
      qwix.QuantizationRule(
        module_path=quantizers.EDGES, weight_qtype=jnp.int8, act_qtype=jnp.int8
      ),
      qwix.QuantizationRule(module_path='.*', weight_qtype=weights, act_qtype=activations),
    ]
  )
  model = qwix.quantize_model(network.model, provider)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  variables = jax.tree.map(jnp.asarray, dict(network.variables))
  return model, {**variables, 'params': qwix.quantize_params(variables['params'], shapes['params'])}


def _side(model: nn.Module, variables: PyTree, hooks: Sequence[models.Hook] = ()) -> Side:
  return jax.jit(lambda v, x: models.apply(model, v, x, hooks=hooks)), variables


def _accuracy(config: ConfigDict, source: Any, side: Side) -> float:
  run, variables = side

  def correct(batch: dict[str, Array]) -> Array:
    logits = run(variables, networks.inputs(config, batch))
    return jnp.argmax(logits, -1) == networks.targets(config, batch)

  found = map_batches(
    correct, source, batch_size=config.eval_batch_size, mesh=training.mesh(config),
    **training.reading(config, 'test'),
  )  # fmt: skip
  return 100 * float(found.mean())


def _packed_bytes(tree: PyTree) -> int:
  leaves = jax.tree.leaves(tree)
  return quantizers.size_in_bytes(tree) - sum(
    leaf.size // 2 for leaf in leaves if leaf.dtype == jnp.int4
  )


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
  """Compares and prints."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.qwix_comparison',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--config', default=str(launcher.CONFIGS / 'qwt' / 'embedded.py'))
  parser.add_argument('--workdir', required=True, help='where trained networks are kept')
  parser.add_argument('--network', default='vit')
  parser.add_argument('--bits', default='8w8a,4w8a')
  parser.add_argument('--repeats', type=int, default=5)
  options = parser.parse_args(arguments)
  config = launcher.load_config(options.config)
  found = compare(
    config,
    launcher.prepare_workdir(options.workdir),
    network=options.network,
    bits=options.bits.split(','),
    repeats=options.repeats,
  )
  from rich.console import Console
  from rich.table import Table

  table = Table('', 'accuracy', 'bytes', 'packed', 'time / float', title=options.network)
  for name, row in found.items():
    numbers = f'{row["accuracy"]:.2f}', f'{row["bytes"]:.0f}', f'{row["packed"]:.0f}'
    table.add_row(name, *numbers, f'{row["time"]:.2f}')
  Console().print(table)
  return found


if __name__ == '__main__':
  main()
