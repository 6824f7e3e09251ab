"""Networks at a bit-width: settings, quantization, compensation, size, and what is compiled for them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from experiments.harness import networks
from experiments.harness.data import Images, Sentences, Tokens
from experiments.harness.runs import Call, Run, Variables
from experiments.harness.sections import Experiment, check_bits
from experiments.harness.settings import free, section
from jaxlab import models, parallel, quantizers
from jaxlab.models import blockwise
from jaxlab.quantizers import compensation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network(networks.Network):
  """A float network and how it is quantized.

  Attributes:
    quantization: 'repq' (transformers), 'percentile' (convolutional networks); both leave stem and
      classifier, the anatomy's edges, at 8 bits. Or 'gptq': kernels of the blocks; `16a` leaves inputs in
      float.
    conv_act_bits: of inputs of convolutions in place of the bit-width's, for 'percentile'.
    gptq: options of `jaxlab.quantizers.gptq_ptq`.
  """

  quantization: Literal['repq', 'percentile', 'gptq'] = 'repq'
  conv_act_bits: int | None = None
  gptq: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Training inputs: `ranges` of them for ranges, `compensation` of them in batches for compensations."""

  ranges: int = 32
  compensation: int = 512
  batch_size: int = 32


@dataclasses.dataclass(frozen=True)
class Fitting:
  """Options of `jaxlab.quantizers.compensation.compensate`."""

  target: Literal['local', 'global'] = 'local'
  dtype: Literal['float16', 'float32'] = 'float16'
  start_block: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of a comparison over networks and bits.

  Attributes:
    networks: those of `network` that are compared.
    network: float networks.
    networks_dir: folder of those that are trained here, which other experiments may share; empty: in the work
      directory.
    bits: such as '4w4a', from many to few.
    calibration: inputs.
    gptq: whether there is a row with GPTQ's kernels in place of rounded ones.
    integers: whether all rows but those that are trained are judged with integers for kernels, too.
  """

  networks: tuple[str, ...]
  network: dict[str, Network]
  networks_dir: str = free('')
  bits: tuple[str, ...]
  calibration: Calibration = section(Calibration)
  gptq: bool = False
  integers: bool = False

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    if not self.networks:
      yield 'networks: expected at least one.'
    for name in self.networks:
      if name not in self.network:
        yield f'networks: there is no network.{name}; sections: {", ".join(self.network)}.'
    chosen = [name for name in self.networks if name in self.network]
    for name in chosen if self.gptq else ():
      if self.network[name].quantization == 'gptq' or self.network[name].conv_act_bits is not None:
        yield (
          f'gptq: network.{name} is quantized by GPTQ already, or has conv_act_bits, which GPTQ does not '
          'know.'
        )
    kernels_alone = all(self.network[name].quantization == 'gptq' for name in chosen)
    low, high = quantizers.MIN_BITS, quantizers.MAX_BITS
    yield from check_bits(self.bits, low, high, in_float=16 if kernels_alone else None)
    sizes = self.calibration
    if sizes.batch_size < 1:
      yield f'calibration.batch_size={sizes.batch_size}: expected at least 1.'
      return
    for name in chosen:
      most = self.network[name].data.train_size
      if not 1 <= sizes.compensation <= most or sizes.compensation % sizes.batch_size:
        yield (
          f'calibration.compensation={sizes.compensation} with batches of {sizes.batch_size}: expected a '
          f'multiple of the batch, at most {most}, the training split of network.{name}.'
        )
      if not 1 <= sizes.ranges <= most:
        yield f'calibration.ranges={sizes.ranges}: expected 1 to {most} ({name}).'


class Method(NamedTuple):
  """A row: a compensation of the quantized network.

  Attributes:
    role: of the row.
    compensation: settings of the compensation.
    fitting: how it is fitted.
    transitions: whether the modules between blocks that change the resolution are compensated, too.
  """

  role: str
  compensation: compensation.Method
  fitting: Fitting = Fitting()
  transitions: bool = False


def quantize(
  own: Network,
  model: nn.Module,
  variables: Any,
  ranges: jax.Array,
  bits: str,
  batches: Sequence[jax.Array] = (),
) -> quantizers.Quantized:
  """Returns the network at a bit-width such as `4w4a`.

  Args:
    own: its section.
    model: the module.
    variables: its float variables.
    ranges: one batch of inputs, for 'repq' and 'percentile'.
    bits: the bit-width.
    batches: of inputs, for 'gptq'.
  """
  weight_bits, input_bits = quantizers.parse_bits(bits)
  parts = models.anatomy(model)
  if own.quantization == 'gptq':
    inside = f'({models.any_of(parts.block_paths)})/.*'
    inputs = None if input_bits == 16 else input_bits
    rules = quantizers.uniform_rules(weight_bits, inputs, path=inside)
    return quantizers.gptq_ptq(model, variables, batches, rules, options=own.gptq, **counted(own))
  rules = quantizers.edge_rules(weight_bits, input_bits, edges=parts)
  if own.quantization == 'repq':
    return quantizers.repq(model, variables, ranges, rules, **counted(own))
  options = {'conv_act_bits': own.conv_act_bits, **counted(own)}
  return quantizers.percentile_ptq(model, variables, ranges, rules, **options)


def quantize_by_gptq(
  own: Network, model: nn.Module, variables: Any, batches: Sequence[jax.Array], bits: str
) -> quantizers.Quantized:
  """Returns the network with kernels of GPTQ's and ranges of inputs by percentiles, edges at 8 bits."""
  rules = quantizers.edge_rules(*quantizers.parse_bits(bits), edges=models.anatomy(model))
  return quantizers.gptq_ptq(model, variables, batches, rules, options=own.gptq, **counted(own))


def counted(own: Network) -> dict[str, str]:
  """Returns the option that says which positions of calibration inputs count: of sentences, the mask."""
  return {'counted': 'mask'} if isinstance(own.data, Sentences) else {}


def compensate(
  own: Network,
  quantized: quantizers.Quantized,
  batches: Sequence[jax.Array],
  method: Method,
  programs: compensation.Programs | None = None,
) -> quantizers.Quantized:
  """Returns the compensated network of a row."""
  parts = models.anatomy(quantized.model)
  between = tuple(block.path for block in parts.transitions) if method.transitions else ()
  blocks = models.any_of((*parts.block_paths, *between))
  options = dataclasses.asdict(method.fitting)
  return compensation.compensate(
    quantized,
    batches,
    method.compensation,
    blocks=blocks,
    programs=programs,
    **options,
    **counted(own),
  )


def megabytes(variables: Variables) -> float:
  """Returns the size of a network in 10^6 bytes: quantized kernels at their bits, the rest at 32.

  The weight matrix of a compensation counts 16 bits, its vectors 32; so do running statistics.
  """
  flat = {name: traverse_util.flatten_dict(dict(tree), sep='/') for name, tree in variables.items()}
  constants = flat.get('quantization', {})
  bits = 0.0
  for path, leaf in (*flat['params'].items(), *flat.get('batch_stats', {}).items()):
    low, high = constants.get(f'{path}/low'), constants.get(f'{path}/high')
    bits += leaf.size * (32 if high is None else float(np.log2(float(high) - float(low) + 1)))
  for path, leaf in flat.get('compensation', {}).items():
    bits += leaf.size * (16 if path.endswith('weight') else 32)
  return bits / 8e6


def programs(config: Settings) -> dict[str, Run | Call]:
  """Returns the trainings of float networks, and the pipeline of the first network at its last bit-width.

  `quantize`: all ranges, reparametrization and kernels, from one calibration batch; `block`: one batch
  through the first block, in float and quantized, the statistics of a linear compensation, its closed form,
  and the compensated output; `forward`: the quantized network on an evaluation batch. GPTQ's kernels are
  found block by block from the host, so that there `quantize` is missing; of an encoder of sentences, whose
  masks decide shapes, there is `forward` alone.
  """
  found: dict[str, Run | Call] = {}
  for name in config.networks:
    if config.network[name].recipe is not None:
      found[name] = networks.training(config, config.network[name], f'{name} in float')
  own, bits = config.network[config.networks[0]], config.bits[-1]
  model, hooks = networks.create(own.model), quantizers.operand_hooks()
  encodes, sizes = isinstance(own.data, Sentences), config.calibration
  searched = own.quantization != 'gptq' and not encodes

  def search(variables: Variables, x: jax.Array) -> quantizers.Quantized:
    return quantize(own, model, variables, x, bits)

  def over_mesh(shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns shapes, each split by the rule for parameters."""
    return parallel.abstract(shapes, parallel.fsdp_shardings(shapes, mesh))

  def inputs(mesh: jax.sharding.Mesh, count: int) -> jax.ShapeDtypeStruct:
    return parallel.abstract(input_shape(own, count), networks.calibration_sharding(mesh, count))

  def floats(mesh: jax.sharding.Mesh) -> Variables:
    shape = own.data.view if isinstance(own.data, Images) else None
    return over_mesh(models.abstract_variables(model, shape), mesh)

  @functools.cache
  def quantized(mesh: jax.sharding.Mesh) -> quantizers.Quantized:
    """Returns the shapes of the quantized network."""
    if not searched:
      return quantizers.Quantized(model, {**floats(mesh), 'quantization': {}}, {}, hooks)
    shapes = jax.eval_shape(search, floats(mesh), inputs(mesh, sizes.ranges))
    return over_mesh(shapes, mesh)

  def block(mesh: jax.sharding.Mesh) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    batch, network = inputs(mesh, sizes.batch_size), quantized(mesh)
    variables, exact = network.unbind()[0], network.in_float().unbind()[0]
    first = blockwise.find_blocks(model, variables, (batch,), {}, hooks)[1][0]

    def fit_one(quantized, exact, leaves):
      y = first.run(quantized, leaves, hooks)
      error, x = first.run(exact, leaves, hooks) - y, leaves[0]
      if own.quantization != 'percentile':
        fit = compensation.fit_linear_compensation(x, error)
      else:
        groups = compensation.num_groups(x.shape[-1], y.shape[-1])
        fit = compensation.fit_conv_compensation(x, error, groups=groups)
      return compensation.apply_linear_compensation(y, x, fit)

    slices = (blockwise.slice_variables(tree, first.path) for tree in (variables, exact))
    return fit_one, (*slices, parallel.abstract(list(first.call.array_shapes), batch.sharding))

  def forward(mesh: jax.sharding.Mesh) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    batch = inputs(mesh, config.eval_batch_size)
    call = (lambda network, x: network(**x)) if encodes else (lambda network, x: network(x))
    return call, (quantized(mesh), batch)

  if searched:
    found['quantize'] = Call(lambda mesh: (search, (floats(mesh), inputs(mesh, sizes.ranges))))
  if not encodes:
    found['block'] = Call(block)
  return found | {'forward': Call(forward)}


def input_shape(own: Network, count: int) -> Any:
  """Returns what the model reads of `count` records."""
  if isinstance(own.data, Tokens):
    return jax.ShapeDtypeStruct((count, own.data.length), jnp.int32)
  if isinstance(own.data, Sentences):
    return own.task.inputs(own.task.batch(count))
  return jax.ShapeDtypeStruct((count, *own.data.view), jnp.float32)
