"""Compares post-training quantization here with qwix's, on one trained network.

  python -m experiments compare --workdir=DIR [--config=qwt/embedded] [--network=vit] [--bits=8w8a,4w8a]

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

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks
from experiments.harness.costs import alternate
from experiments.harness.networks import Loaded
from experiments.protocols import quantized_networks
from experiments.protocols.quantized_networks import Settings
from jaxlab import models, quantizers
from jaxlab.quantizers.networks.execution import integer_network
from jaxlab.training import map_batches

Array = jax.Array
PyTree = Any
Side = tuple[Callable[[PyTree, Array], Array], PyTree]


def compare(
  config: Settings,
  folder: pathlib.Path,
  *,
  network: str = 'vit',
  bits: Sequence[str] = ('8w8a', '4w8a'),
  repeats: int = 5,
) -> dict[str, dict[str, float]]:
  """Returns `{row: {accuracy, bytes, packed, time}}`, `time` as a ratio to the float network.

  Args:
    config: of a post-training experiment, e.g. `qwt/embedded`.
    folder: where trained networks are kept.
    network: a section of `config.network`.
    bits: such as `'4w8a'`.
    repeats: of the timing.

  Raises:
    ValueError: for a network that is not there, bits that do not exist, or a work directory of another run.
  """
  if network not in config.network:
    raise ValueError(f'network={network!r}: sections: {", ".join(config.network)}.')
  for value in bits:
    quantizers.edge_rules(*quantizers.parse_bits(value))
  own = config.network[network]
  loaded = networks.load(config, own, folder / f'{network}-seed{config.seed}')
  (ranges,) = loaded.calibration(config.calibration.ranges, config.calibration.ranges)
  sides = {'float': _side(loaded.model, loaded.variables)}
  for value in bits:
    fake = quantized_networks.quantize(own, loaded.model, loaded.variables, ranges, value)
    integers = integer_network(fake)
    sides[f'{value} fake-quantized'] = _side(loaded.model, *fake.unbind())
    sides[f'{value} integer'] = _side(loaded.model, *integers.unbind())
    sides[f'{value} qwix'] = _side(*qwix_network(loaded.model, loaded.variables, ranges, value))
  batch = jnp.concatenate([ranges] * (1 + config.eval_batch_size // len(ranges)))
  batch = batch[: config.eval_batch_size]

  def timed(side: Side) -> Callable[[], None]:
    run, variables = side
    jax.block_until_ready(run(variables, batch))
    return lambda: jax.block_until_ready(run(variables, batch))

  times = alternate({name: timed(side) for name, side in sides.items()}, repeats)
  return {
    name: {
      'accuracy': _accuracy(loaded, side),
      'bytes': float(quantizers.size_in_bytes(side[1])),
      'packed': float(_packed_bytes(side[1])),
      'time': times[name] / times['float'],
    }
    for name, side in sides.items()
  }


def qwix_network(
  model: nn.Module, variables: PyTree, x: Array, bits: str
) -> tuple[nn.Module, PyTree]:
  """Returns qwix's module and variables at a bit-width such as `4w8a`, edges at 8/8.

  Args:
    model: the module.
    variables: its float variables.
    x: a batch of inputs.
    bits: the bit-width.

  Raises:
    ValueError: for widths that are not qwix's types, int4 and int8.
  """
  import qwix

  widths = quantizers.parse_bits(bits)
  if not set(widths) <= {4, 8}:
    raise ValueError(f'bits={bits!r}: qwix has integer types of 4 and 8 bits.')
  weights, activations = (jnp.dtype(f'int{width}') for width in widths)
  rules = [qwix.QuantizationRule(module_path='.*', weight_qtype=weights, act_qtype=activations)]
  if edges := models.any_of(models.anatomy(model).edges):
    first = {'weight_qtype': jnp.int8, 'act_qtype': jnp.int8}
    rules.insert(0, qwix.QuantizationRule(module_path=edges, **first))
  quantized = qwix.quantize_model(model, qwix.PtqProvider(rules))
  shapes = jax.eval_shape(quantized.init, jax.random.key(0), x)
  variables = jax.tree.map(jnp.asarray, dict(variables))
  params = qwix.quantize_params(variables['params'], shapes['params'])
  return quantized, {**variables, 'params': params}


def _side(model: nn.Module, variables: PyTree, hooks: Sequence[models.Hook] = ()) -> Side:
  return jax.jit(lambda v, x: models.apply(model, v, x, hooks=hooks)), variables


def _accuracy(loaded: Loaded, side: Side) -> float:
  task, (run, variables) = loaded.network.task, side

  def correct(batch: dict[str, Array]) -> Array:
    return task.score(run(variables, task.inputs(batch)), task.targets(batch))['correct']

  found = map_batches(
    correct,
    loaded.test,
    batch_size=loaded.config.eval_batch_size,
    mesh=loaded.config.mesh.make(),
    **harness_data.reading(loaded.network.data, 'test'),
  )
  return 100 * float(found.mean())


def _packed_bytes(tree: PyTree) -> int:
  leaves = jax.tree.leaves(tree)
  return quantizers.size_in_bytes(tree) - sum(
    leaf.size // 2 for leaf in leaves if leaf.dtype == jnp.int4
  )


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
  """Compares and prints."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments compare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--config', default='qwt/embedded', metavar='PAPER/SETTING', help='default: %(default)s'
  )
  parser.add_argument(
    '--workdir', required=True, metavar='DIR', help='where trained networks are kept'
  )
  parser.add_argument('--network', default='vit', help='one of the setting; default: %(default)s')
  parser.add_argument('--bits', default='8w8a,4w8a', help='default: %(default)s')
  parser.add_argument('--repeats', type=int, default=5, help='of the times; default: %(default)s')
  options = parser.parse_args(arguments)
  paper, _, setting = options.config.partition('/')
  with launcher.errors_without_traceback():
    config = launcher.load(paper, setting or 'embedded')
    if not isinstance(config, Settings):
      raise ValueError(f'--config={options.config} compares no quantized networks.')
    launcher.check(config)
    folder = pathlib.Path(options.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    found = compare(
      config,
      folder,
      network=options.network,
      bits=options.bits.split(','),
      repeats=options.repeats,
    )
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text

  heads = ('', 'accuracy', 'bytes', 'packed', 'time / float')
  table = Table(*heads, title=Text(options.network))
  for name, row in found.items():
    numbers = f'{row["accuracy"]:.2f}', f'{row["bytes"]:.0f}', f'{row["packed"]:.0f}'
    table.add_row(Text(name), *numbers, f'{row["time"]:.2f}')
  Console().print(table)
  return found
