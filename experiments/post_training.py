"""Float, quantized, quantized and compensated: the comparison of QwT, QwT-v2 and NBC, over networks and bits.

For each network of `config.networks` and each bit-width of `config.bits`: ranges from
`calibration.ranges` training inputs (RepQ-ViT for transformers, percentiles for convolutional networks), or
GPTQ's weights from `calibration.compensation` of them; then every method in closed form, block by block, on
the latter, of which the former are the first.
"""

import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from experiments import compensation_tuning, networks, results, training
from experiments.compensation_tuning import Tuning
from experiments.quantized_features import parse_bits
from experiments.results import row
from jaxlab import models, parallel, quantizers
from jaxlab.models import blockwise as parts
from jaxlab.quantizers import compensation

Metrics = dict[str, float]


class Method(NamedTuple):
  """A row of the comparison: its role, the compensation, and options of `compensation.compensate`."""

  role: str
  settings: compensation.Method
  options: Mapping[str, Any] = {}


def compare(
  config: ConfigDict,
  workdir: pathlib.Path,
  methods: Mapping[str, Method],
  tunings: Mapping[str, Tuning] = types.MappingProxyType({}),
) -> dict:
  """Returns the results of `run`: rows for the float network, quantization alone, each method and tuning.

  Metrics are named `<network>_<bits>_<metric>`: `accuracy` (percent) or `perplexity`, `megabytes` (see
  there), `logit_mse` against the float network, `logit_mse_ratio` to that of quantization alone,
  `block_error_ratio`, the sum over compensated modules of the mean squared error on calibration data over
  that before; and per network `extra_parameters` and `extra_multiply_adds` (of one example).

  `tunings` are trainings of `compensation_tuning`, each from another row; they are at some bit-widths alone.
  """
  sections = check(config)
  tuned_bits = {
    (name, title): compensation_tuning.bit_widths(config, own, tuning.settings)
    for name, own in sections.items()
    for title, tuning in tunings.items()
  }
  folder = type(workdir)(config.networks_dir or workdir / 'networks')
  metrics: dict[str, Metrics] = {name: {} for name in ('float', 'PTQ', *methods, *tunings)}
  reports = {}
  for name, own in sections.items():
    network = networks.load(config, name, folder)
    (ranges,) = network.calibration(config.calibration.ranges, config.calibration.ranges)
    batches = network.calibration(config.calibration.compensation, config.calibration.batch_size)
    reference = network.score(network.variables, network.variables)
    training.say(f'{name} in float: {_text(reference)}')
    programs = compensation.Programs()
    for bits in config.bits:
      prefix = f'{name}_{bits}_'
      exact = {name: value for name, value in reference.items() if name != 'logit_mse'}
      _add(metrics['float'], prefix, exact | {'megabytes': megabytes(network.variables)})
      quantized = quantize(own, network.model, network.variables, ranges, bits, batches)
      alone = network.score(network.variables, quantized.variables, quantized.hooks)
      alone['megabytes'] = megabytes(quantized.variables)
      _add(metrics['PTQ'], prefix, alone | {'logit_mse_ratio': 1.0})
      training.say(f'{name} {bits}: {_text(alone)}')
      finished = {'PTQ': quantized}
      for title, method in methods.items():
        found = compensation.compensate(
          network.model,
          quantized,
          batches,
          method.settings,
          blocks=blocks_of(own, method.settings),
          programs=programs,
          **method.options,
        )
        finished[title] = found
        scored = network.score(network.variables, found.variables, found.hooks)
        report = found.report
        scored['megabytes'] = megabytes(found.variables)
        scored['logit_mse_ratio'] = scored['logit_mse'] / alone['logit_mse']
        scored['block_error_ratio'] = report.error_after.sum() / report.error_before.sum()
        _add(metrics[title], prefix, scored)
        metrics[title][f'{name}_extra_parameters'] = float(report.parameters.sum())
        metrics[title][f'{name}_extra_multiply_adds'] = float(report.multiply_adds.sum())
        reports[name, bits, title] = report
        training.say(f'{name} {bits} {title}: {_text(scored)}')
      for title, tuning in tunings.items():
        if bits not in tuned_bits[name, title]:
          continue
        start = {'row': tuning.base, 'bits': bits, 'calibration': config.calibration.to_dict()}
        if tuning.base in methods:
          base = methods[tuning.base]
          start |= {'method': repr(base.settings), 'options': dict(base.options)}
        variables = compensation_tuning.tune(
          compensation_tuning.section(own, tuning.settings, start),
          network,
          quantized,
          finished[tuning.base],
          workdir / 'fine_tuning' / f'{name}-{bits}-{tuning.base}-seed{config.seed}',
          f'{name} {bits} {title}',
        )
        if variables is None:
          continue
        scored = network.score(network.variables, variables, finished[tuning.base].hooks)
        scored['megabytes'] = megabytes(variables)
        scored['logit_mse_ratio'] = scored['logit_mse'] / alone['logit_mse']
        _add(metrics[title], prefix, scored)
        extra = {k: v for k, v in metrics[tuning.base].items() if k.startswith(f'{name}_extra_')}
        metrics[title] |= extra
        training.say(f'{name} {bits} {title}: {_text(scored)}')
  roles = {'float': 'reference', 'PTQ': 'baseline'}
  roles |= {title: item.role for title, item in (*methods.items(), *tunings.items())}
  rows = [row(title, roles[title], found) for title, found in metrics.items() if found]
  show(config, rows, reports, workdir)
  ran = tuple(f'{name}_{bits}_' for name in sections for bits in config.bits)
  asked = ConfigDict({'claims': tuple(c for c in config.claims if c['metric'].startswith(ran))})
  return results.results(config, rows, results.measured_claims(asked, rows))


def check(config: ConfigDict) -> dict[str, ConfigDict]:
  """Returns the sections of `config.networks`; what can be wrong with them is found before any training.

  Raises:
    ValueError: for bits outside of 2 to 8 (GPTQ: activations also 16, in float), networks or kinds of
      quantization that do not exist, or calibration that does not come out of the training split in even
      batches, or test batches that do not divide over the devices.
  """
  sections = {name: networks.section(config, name) for name in config.networks}
  weights_alone = all(own.quantization == 'gptq' for own in sections.values())
  for bits in config.bits:
    both = parse_bits(bits)
    chosen = both[:1] if weights_alone and both[1] == 16 else both
    if not all(quantizers.MIN_BITS <= b <= quantizers.MAX_BITS for b in chosen):
      raise ValueError(
        f'bits: {bits!r} is outside of {quantizers.MIN_BITS} to {quantizers.MAX_BITS} bits.'
      )
  mesh, sizes = training.mesh(config), config.calibration
  for name, own in sections.items():
    if own.quantization not in ('repq', 'percentile', 'gptq'):
      raise ValueError(
        f"network.{name}.quantization={own.quantization!r}: expected 'repq', 'percentile' or 'gptq'."
      )
    most = own.data.train_size
    if not 1 <= sizes.compensation <= most or sizes.compensation % sizes.batch_size:
      raise ValueError(
        f'calibration.compensation={sizes.compensation} with batches of {sizes.batch_size}: expected a '
        f'multiple of the batch, at most {most}, the training split of network.{name}.'
      )
    if not 1 <= sizes.ranges <= most:
      raise ValueError(f'calibration.ranges={sizes.ranges}: expected 1 to {most} ({name}).')
    parallel.check_batch_size(own.eval_batch_size, mesh)
  return sections


def blocks_of(config: ConfigDict, method: compensation.Method) -> str:
  """Returns the pattern of the blocks; QwT-v2 at layers also compensates those between them (Swin)."""
  at_layers = getattr(method, 'granularity', None) == 'linear'
  return config.get('layer_blocks', config.blocks) if at_layers else config.blocks


def megabytes(variables: Mapping[str, Any]) -> float:
  """Returns the size of a network in 10^6 bytes: quantized kernels at their bits, the rest at 32.

  The weight matrix of a compensation counts 16 bits (QwT), its vectors 32; so do running statistics.
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


def quantize(
  config: ConfigDict,
  model: nn.Module,
  variables: Any,
  ranges: jax.Array,
  bits: str,
  batches: Sequence[jax.Array] = (),
) -> quantizers.Quantized:
  """Returns the network at a bit-width such as `4w4a`; patch embedding or stem and classifier at 8/8.

  With `quantization='gptq'` the kernels of the blocks alone, from `batches`; `16a` leaves inputs in float.
  """
  if config.quantization == 'gptq':
    weight_bits, input_bits = parse_bits(bits)
    inside = f'({config.blocks})/.*'
    policy = quantizers.BitPolicy(
      [(inside, weight_bits)], [] if input_bits == 16 else [(inside, input_bits)]
    )
    return quantizers.gptq_ptq(
      model, variables, batches, policy, blocks=config.blocks, options=config.gptq
    )
  policy = quantizers.edge_policy(*parse_bits(bits), edges=config.get('edges', quantizers.EDGES))
  if config.quantization == 'repq':
    return quantizers.repq(model, variables, ranges, policy)
  return quantizers.percentile_ptq(
    model, variables, ranges, policy, conv_act_bits=config.get('conv_act_bits')
  )


def lower(config: ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, jax.stages.Lowered]:
  """Returns the pipeline of the first of `config.networks`, at its last bit-width, lowered for a mesh.

  `quantize`: all ranges, reparametrization and kernels, from one calibration batch; `block`: one batch
  through the first block, in float and quantized, the statistics of QwT's layer, its closed form, and the
  compensated output; `forward`: the quantized network on an evaluation batch. GPTQ's kernels are found block
  by block from the host, so that there `quantize` is missing.
  """
  own, hooks = networks.section(config, config.networks[0]), quantizers.operand_hooks()
  model = models.create(**own.model)

  def inputs(count: int) -> jax.ShapeDtypeStruct:
    sharding = networks.calibration_sharding(mesh, count)
    if own.task == 'language':
      return jax.ShapeDtypeStruct((count, own.data.length), jnp.int32, sharding=sharding)
    shape = (count, own.data.image_size, own.data.image_size, own.data.channels)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

  def place(tree: Any, sharding: NamedSharding | None = None) -> Any:
    shardings = parallel.fsdp_shardings(tree, mesh)
    return jax.tree.map(
      lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or own),
      tree,
      shardings,
    )

  def ptq(variables, x):
    return quantize(own, model, variables, x, config.bits[-1])[:2]

  calibration = inputs(config.calibration.ranges)
  variables = place(models.abstract_variables(model, calibration.shape[1:]))
  searched = own.quantization != 'gptq'
  quantized = floats = {**variables, 'quantization': {}}
  if searched:
    quantized, floats = place(jax.eval_shape(ptq, variables, calibration))
  batch = inputs(config.calibration.batch_size)
  root = parts.Part('', model, parts.Skeleton.of(((batch,), {})))
  block = parts.find_parts(root, quantized, [batch], hooks, own.blocks)[0]

  def compensate(quantized, floats, leaves):
    y = block.run(quantized, leaves, hooks)
    error = block.run(floats, leaves, hooks) - y
    x = leaves[0]
    if own.quantization != 'percentile':
      fit = compensation.fit_linear_compensation(x, error)
    else:
      groups = compensation.num_groups(x.shape[-1], y.shape[-1])
      fit = compensation.fit_conv_compensation(x, error, groups=groups)
    return compensation.apply_linear_compensation(y, x, fit)

  search = {'quantize': jax.jit(ptq).lower(variables, calibration)} if searched else {}
  return search | {
    'block': jax.jit(compensate).lower(
      parts.slice_variables(quantized, block.path),
      parts.slice_variables(floats, block.path),
      place(list(block.call.array_shapes), batch.sharding),
    ),
    'forward': jax.jit(lambda v, x: models.apply(model, v, x, hooks=hooks)).lower(
      quantized, inputs(own.eval_batch_size)
    ),
  }


def _add(metrics: Metrics, prefix: str, found: Mapping[str, float]) -> None:
  metrics |= {f'{prefix}{name}': float(value) for name, value in found.items()}


def _text(metrics: Mapping[str, float]) -> str:
  return ', '.join(f'{name} {value:.4g}' for name, value in metrics.items())


def show(config: ConfigDict, rows: list, reports: Mapping[tuple, Any], workdir: Any) -> None:
  """Prints the table; draws accuracy over bits and the errors of all blocks at the lowest bit-width."""
  kinds = {
    name: 'perplexity' if config.network[name].task == 'language' else 'accuracy'
    for name in config.networks
  }
  title = f'{config.paper}, {config.setting}, seed {config.seed}'
  results.print_table(
    title, rows,
    [f'{name}_{bits}_{kind}' for name, kind in kinds.items() for bits in config.bits]
    + [f'{name}_{bits}_megabytes' for name in kinds for bits in config.bits]
    + [f'{name}_{bits}_logit_mse_ratio' for name in kinds for bits in config.bits]
    + [f'{name}_extra_{what}' for name in kinds for what in ('parameters', 'multiply_adds')],
  )  # fmt: skip
  if jax.process_index():
    return
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  def panels(ylabel):
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.5 * len(kinds), 3.6), squeeze=False)
    axes[0, 0].set_ylabel(ylabel)
    figure.suptitle(title)
    return figure, dict(zip(kinds, axes[0], strict=True))

  def save(figure, axes, name):
    for axis in axes.values():
      axis.grid(alpha=0.3, axis='y')
    list(axes.values())[-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(str(workdir / name), dpi=120)
    plt.close(figure)

  figure, axes = panels('accuracy (%) or perplexity')
  width = 0.8 / len(rows)
  for name, kind in kinds.items():
    for i, item in enumerate(rows):
      values = [item['metrics'].get(f'{name}_{bits}_{kind}', np.nan) for bits in config.bits]
      axes[name].bar(np.arange(len(values)) + i * width, values, width, label=item['name'])
    axes[name].set_xticks(np.arange(len(config.bits)) + 0.4 - width / 2, config.bits)
    axes[name].set_title(f'{name}: {kind}')
    if kind == 'perplexity':
      axes[name].set_yscale('log')
  save(figure, axes, 'accuracy_over_bits.png')

  figure, axes = panels('mean squared error on calibration data')
  lowest = config.bits[-1]
  for name in kinds:
    for item in rows:
      if (report := reports.get((name, lowest, item['name']))) is not None:
        before, after = report.error_before, report.error_after
        axes[name].plot(before, ':', marker='o', color='gray', label=f'before {item["name"]}')
        axes[name].plot(after, '-', marker='o', label=f'after {item["name"]}')
    axes[name].set_title(f'{name} at {lowest}')
    axes[name].set_xlabel('compensated module')
    axes[name].set_yscale('log')
  save(figure, axes, 'block_errors.png')
