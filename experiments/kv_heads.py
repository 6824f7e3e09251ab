"""Effectively Compress KV Heads for LLM (Yu et al. 2024, arXiv 2406.07056).

What a decoder caches, its keys and values, has low rank, more so than the weights that make it. Groups of
heads are cut to the directions of one head that keep most of their caches on calibration data (SVD-a), and
the projections are folded into the layers around: multi-head attention becomes grouped-query attention, whose
cache is half or a quarter. Claim: before any training far better than the same by weights (SVD-w) and than
the mean of each group's heads, and still better after a short fine-tuning.

Keys under rotary embedding do not fold: they are projected behind the rotation. Rows of reference show the
projection before it, a basis that commutes with it, and what folding as if it were not there does.

  python -m experiments.kv_heads
  python -m experiments.kv_heads --config=embedded_alibi
  python -m experiments.kv_heads --config=llama2_7b --workdir=DIR
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks, pictures, results, runs
from experiments.harness.data import Tokens
from experiments.harness.networks import Loaded, Network
from experiments.harness.runs import Call, Run, Variables, say
from experiments.harness.sections import Experiment, Recipe, check_batch
from experiments.harness.settings import found_by, free, section
from experiments.protocols import decoding
from experiments.protocols.decoding import Decoding
from jaxlab import adapters, compression, models, parallel
from jaxlab.compression import Grams, GroupedHeads
from jaxlab.training import Initial, LossState, Out, make_program, map_batches

Array = jax.Array

WHOLE, EQUAL = 'original', 'equal singular values'
TITLES = {
  'svd_a': 'SVD-a',
  'svd_w': 'SVD-w',
  'mean': 'mean pooling',
  'before': 'SVD-a before rotation',
  'commuting': 'SVD-a commuting',
  'ignored': 'SVD-a folded wrongly',
}
ROPES = ('before', 'commuting', 'ignored')
ROLES = {'svd_a': 'method', 'svd_w': 'baseline', 'mean': 'baseline'}
METRICS = ('loss', 'loss_increase', 'tuned_loss', 'cache', 'decode_time', 'energy')


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Training windows whose caches are looked at.

  Attributes:
    count: windows.
    batch_size: at once.
    on_device: multiply each batch in float32 on the device, see `compression.cache_grams`.
  """

  count: int = 128
  batch_size: int = 16
  on_device: bool = False


@dataclasses.dataclass(frozen=True)
class Tuning:
  """The fine-tuning of what was converted, LoRA at all layers of attention.

  Attributes:
    recipe: with one epoch, of `steps`.
    steps: of the optimizer.
    rank: of LoRA.
    alpha: of LoRA, whose product is scaled by alpha / rank.
  """

  recipe: Recipe
  steps: int = 200
  rank: int = 16
  alpha: float = 32.0

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.steps < 1 or self.rank < 1:
      yield f'steps={self.steps}, rank={self.rank}: expected at least 1.'
    if self.recipe.epochs != 1:
      yield f'recipe.epochs={self.recipe.epochs}: expected 1, of `steps`.'
    if not self.alpha > 0:
      yield f'alpha={self.alpha}: expected a positive number.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of the conversion.

  Attributes:
    network: a decoder with its data, trained here or with public weights.
    group_sizes: heads of keys and values that become one; each divides the largest.
    runs: rows: 'svd_a', 'svd_w', 'mean', and with rotary embedding 'before', 'commuting', 'ignored'.
    tuned: those of `runs` that are fine-tuned.
    calibration: of the bases.
    tuning: the fine-tuning.
    decoding: what is timed.
  """

  network: Network
  group_sizes: tuple[int, ...] = (2, 4)
  runs: tuple[Literal['svd_a', 'svd_w', 'mean', 'before', 'commuting', 'ignored'], ...] = tuple(
    TITLES
  )
  tuned: tuple[Literal['svd_a', 'svd_w', 'mean', 'before', 'commuting', 'ignored'], ...] = tuple(
    ROLES
  )
  calibration: Calibration = section(Calibration)
  tuning: Tuning
  decoding: Decoding = free(default_factory=Decoding)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    own, size = self.network, self.calibration
    if not isinstance(own.data, Tokens):
      yield f'network.data: {own.data.name!r} are no windows of tokens.'
      return
    if (
      not 1 <= size.batch_size <= size.count <= own.data.train_size or size.count % size.batch_size
    ):
      yield (
        f'calibration: expected at most {own.data.train_size} windows in whole batches, got {size.count} in '
        f'batches of {size.batch_size}.'
      )
    sizes = self.group_sizes
    if not sizes or len(set(sizes)) < len(sizes) or min(sizes) < 1:
      yield f'group_sizes={sizes}: expected positive numbers, each once.'
    elif any(max(sizes) % size for size in sizes):
      yield f'group_sizes={sizes}: expected divisors of the largest.'
    if not self.runs or not set(self.tuned) <= set(self.runs):
      yield f'tuned={self.tuned}: expected some of runs={self.runs}.'
    for name in ('runs', 'tuned'):
      if len(set(rows := getattr(self, name))) < len(rows):
        yield f'{name}={",".join(rows)}: each may be there once.'
    for name, recipe in (('tuning', self.tuning.recipe), ('network', own.recipe)):
      if recipe is not None:
        yield from check_batch(self.mesh, recipe.batch_size, f'{name}.recipe.batch_size')
        if recipe.batch_size > own.data.train_size:
          yield f'{name}.recipe.batch_size={recipe.batch_size}: more than {own.data.train_size} records.'

  @property
  def model(self) -> nn.Module:
    """The decoder."""
    return networks.create(self.network.model)


def way(name: str) -> Literal['before', 'commuting', 'ignored'] | None:
  """Returns the treatment of rotated keys of a row; None: the usual one."""
  return name if name in ROPES else None


def converted(
  name: str, model: nn.Module, variables: Variables, grams: Mapping[str, Grams], group_size: int
) -> GroupedHeads:
  """Returns the decoder of a row, by the Gram matrices of its caches."""
  if name == 'mean':
    return compression.pool_heads(model, variables, group_size)
  if name == 'svd_w':
    grams = compression.weight_grams(model, variables, group_size)
  bases = compression.head_bases(model, grams, way(name))
  return compression.group_heads(model, variables, bases, way(name))


def shapes(config: Settings, name: str, group_size: int) -> GroupedHeads:
  """Returns the decoder of a row without its values."""
  rope = way(name)
  if name == 'mean' and compression.attention_layout(config.model).rotary:
    rope = 'commuting'  # plain grouped-query attention, too
  return _shapes(config.model, group_size, rope)


# Rows of one form share it: to trace large decoders takes seconds.
_shapes = functools.lru_cache(compression.grouped_shapes)


def whole_shapes(config: Settings) -> GroupedHeads:
  """Returns the original decoder without its values."""
  return GroupedHeads(config.model, dict(models.abstract_variables(config.model)))


# Rows of one form share it, and so what is compiled with it.
lora = functools.lru_cache(adapters.lora_hooks)


def tuned_layers(model: nn.Module) -> list[str]:
  """Returns the layers of attention; BLOOM's one layer of queries, keys and values gets one pair for all."""
  branches = [own for block in models.anatomy(model).blocks for own in block.branches]
  return [layer for own in branches if own.kind == 'attention' for layer in own.layers]


def tuning(config: Settings, name: str, group_size: int) -> Run:
  """Returns the fine-tuning of a row: LoRA alone is trained, on the next token."""
  own, task, small = config.tuning, config.network.task, shapes(config, name, group_size)
  layers = tuple(tuned_layers(small.model))
  hooks = (*small.hooks, *lora(layers, own.alpha / own.rank))

  def init(key: Array) -> Initial:
    return Initial(adapters.init_lora(key, small.variables['params'], layers, own.rank))

  def loss(lora: Any, state: LossState, batch: Any, key: Array) -> tuple[Array, Out]:
    del key
    variables = {**state.frozen['variables'], 'lora': lora}
    logits = models.apply(small.model, variables, task.inputs(batch), hooks=hooks)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, task.targets(batch))
    return jnp.mean(losses), Out()

  schedule = own.recipe.schedule.make(1, own.steps)
  program = make_program(
    init,
    loss,
    own.recipe.optimizer.make(schedule),
    task.batch(own.recipe.batch_size),
    frozen={'variables': small.variables},
    **own.recipe.program_options,
  )
  decides = {'network': config.network, 'row': name, 'group_size': group_size}
  decides |= {'calibration': config.calibration, 'tuning': own}
  title = f'{TITLES[name]}, groups of {group_size}'
  return Run(config, config.network.data, own.recipe, program, own.steps, decides, title)


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  problems = list(found_by('network.model', compression.attention_layout, config.model))
  yield from problems
  if not problems and isinstance(config.network.data, Tokens):
    layout = compression.attention_layout(config.model)
    for size in config.group_sizes:
      if size > 0 and layout.num_kv_heads % size:
        yield (
          f'group_sizes: {size} does not divide the {layout.num_kv_heads} heads of keys and values.'
        )
    without = [name for name in config.runs if name in ROPES]
    if not layout.rotary and without:
      yield f'runs: {", ".join(without)} are of rotary embedding, which the network does not have.'
    longest = getattr(config.model, 'max_length', None)
    if isinstance(config.model, models.GPT2) and config.decoding.length > longest:
      yield f'decoding.length={config.decoding.length} exceeds the {longest} positions of the network.'
  if not problems and config.decoding.partition:
    weights, mesh = whole_shapes(config).variables, config.mesh.make()
    yield from found_by(
      'decoding.partition', decoding.weight_shardings, config.decoding, weights, mesh
    )
  rows = [WHOLE, EQUAL, *map(re.escape, TITLES.values())]
  metrics = [f't{size}_{name}' for size in config.group_sizes for name in METRICS]
  yield from results.check_claims(config, rows, metrics)


def programs(config: Settings, facts: None = None) -> dict[str, Run | Call]:
  """Returns the training, if there is one; what calibrates; steps of decoding; and the fine-tunings."""
  del facts
  found: dict[str, Run | Call] = {}
  if config.network.recipe is not None:
    found['original'] = networks.training(config, config.network, WHOLE)
  found['calibrate'] = Call(functools.partial(calibrating, config))
  found['decode'] = decoding.program(config.decoding, lambda: whole_shapes(config))
  for size in config.group_sizes:
    for name in config.runs:
      if name in ('svd_a', *ROPES[:2]):
        make = functools.partial(shapes, config, name, size)
        found[f'decode_{name}_{size}'] = decoding.program(config.decoding, make)
  for size in config.group_sizes:
    for name in config.tuned:
      found[f'{name}_{size}'] = tuning(config, name, size)
  return found


def calibrating(config: Settings, mesh: jax.sharding.Mesh) -> tuple[Any, tuple[Any, ...]]:
  """Returns the Gram matrices of a batch's caches as a function of weights and tokens, and their shapes."""
  size, length = config.calibration.batch_size, config.network.data.length
  tokens = jax.ShapeDtypeStruct((size, length), jnp.int32)

  def grams(variables: Variables, tokens: Array) -> Any:
    caches = compression.collect_caches(config.model, variables, tokens)
    return compression.batch_grams(caches, max(config.group_sizes))

  variables = whole_shapes(config).variables
  variables = parallel.abstract(variables, parallel.fsdp_shardings(variables, mesh))
  return grams, (variables, parallel.abstract(tokens, networks.calibration_sharding(mesh, size)))


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains or loads the decoder, looks at its caches, makes them smaller in each way, and compares."""
  net = networks.load(config, config.network, workdir / 'original')
  size, largest = config.calibration, max(config.group_sizes)
  layout = compression.attention_layout(net.model)
  grams = compression.cache_grams(
    net.model,
    net.variables,
    net.calibration(size.count, size.batch_size),
    largest,
    on_device=size.on_device,
  )
  whole = GroupedHeads(net.model, net.variables)
  original = loss_of(config, net, whole)
  say(f'{WHOLE}: loss {original:.4g}')
  rows = {WHOLE: results.row(WHOLE, 'reference', {}), EQUAL: results.row(EQUAL, 'reference', {})}
  rows |= {
    name: results.row(TITLES[name], ROLES.get(name, 'reference'), {}) for name in config.runs
  }
  decoders = {WHOLE: whole}
  mesh = config.mesh.make()
  for group_size in config.group_sizes:
    own, part = compression.subgroup_grams(grams, largest // group_size), f't{group_size}'
    kept = 100 * energy(own, layout.head_width)
    rows[WHOLE]['metrics'] |= {f'{part}_loss': original, f'{part}_energy': kept}
    rows[EQUAL]['metrics'][f'{part}_energy'] = 100 / group_size
    for name in config.runs:
      small = converted(name, net.model, net.variables, own, group_size)
      small = small._replace(variables=networks.over_mesh(small.variables, mesh))
      loss = loss_of(config, net, small)
      metrics = {'loss': loss, 'loss_increase': loss - original}
      # What is not timed is not kept: large decoders are held one at a time.
      kept_variables = small.variables if config.decoding.repeats else {}
      decoders[f'{name}_{group_size}'] = small._replace(variables=kept_variables)
      if name in config.tuned:
        tuned = tune(config, net, name, group_size, small, workdir)
        metrics['tuned_loss'] = loss_of(config, net, tuned)
      say(f'{TITLES[name]}, groups of {group_size}: {metrics}')
      rows[name]['metrics'] |= {f'{part}_{key}': value for key, value in metrics.items()}
  relative = decoding.relative_costs(config.decoding, list(decoders.values()))
  costs_of = dict(zip(decoders, relative, strict=True))
  for group_size in config.group_sizes:
    for name in (WHOLE, *config.runs):
      own = costs_of[WHOLE if name == WHOLE else f'{name}_{group_size}']
      rows[name]['metrics'] |= {f't{group_size}_{key}': value for key, value in own.items()}
  found = list(rows.values())
  draw(config, grams, found, workdir / 'heads.png')
  parts = [f't{group_size}' for group_size in config.group_sizes]
  title = 'loss a token; energy in %; cache and decode_time of the original'
  return results.results(config, found, list(METRICS), title, parts)


def energy(grams: Mapping[str, Grams], head_width: int) -> float:
  """Returns the share of the caches' energy that one head a group keeps, the mean over keys and values."""
  shares = [
    compression.energy_shares(gram)[:, head_width - 1]
    for own in grams.values()
    for gram in (own.key, own.value)
  ]
  return float(np.mean(shares))


def tune(
  config: Settings,
  net: Loaded,
  name: str,
  group_size: int,
  small: GroupedHeads,
  workdir: pathlib.Path,
) -> GroupedHeads:
  """Returns a row's decoder fine-tuned, from wherever its folder was left.

  LoRA stays beside the layers, as it was trained: kernels in bfloat16 would round what it adds.
  """
  program = tuning(config, name, group_size)
  frozen = {'variables': small.variables}
  trained = runs.train(program, net.train, workdir / f'{name}_{group_size}', frozen=frozen)
  hooks = lora(tuple(tuned_layers(small.model)), config.tuning.alpha / config.tuning.rank)
  variables = {**small.variables, 'lora': trained.variables['params']}
  return small._replace(variables=variables, hooks=(*small.hooks, *hooks))


def loss_of(config: Settings, net: Loaded, own: GroupedHeads) -> float:
  """Returns the mean loss of a token of the test records, in nats."""
  score = functools.partial(
    scored, own.variables, model=own.model, hooks=own.hooks, task=net.network.task
  )
  values = map_batches(
    score,
    net.test,
    batch_size=config.eval_batch_size,
    mesh=config.mesh.make(),
    **harness_data.reading(net.network.data, 'test'),
  )
  return float(values.mean())


@functools.partial(jax.jit, static_argnames=('model', 'hooks', 'task'))
def scored(variables, batch, *, model, hooks, task) -> Array:
  """Returns the loss of each record; decoders of equal shapes share a compilation."""
  outputs = models.apply(model, variables, task.inputs(batch), hooks=hooks)
  return task.score(outputs, task.targets(batch))['loss']


def draw(
  config: Settings,
  grams: Mapping[str, Grams],
  rows: Sequence[Mapping[str, Any]],
  path: pathlib.Path,
) -> None:
  """Draws losses before and after tuning, a panel a group size, and the energy of the first directions."""
  sizes = config.group_sizes
  rows = [item for item in rows if item['name'] != EQUAL]
  rows = [item for item in rows if not config.pictured or item['name'] in config.pictured]
  with pictures.drawn(path, 1, len(sizes) + 1, size=(4 * (len(sizes) + 1), 3.6)) as axes:
    for axis, size in zip(axes, sizes):
      names = [item['name'] for item in rows]
      for shift, (metric, label) in enumerate(
        ((f't{size}_loss', 'converted'), (f't{size}_tuned_loss', 'fine-tuned'))
      ):
        values = [item['metrics'].get(metric, np.nan) for item in rows]
        axis.barh(np.arange(len(rows)) + 0.4 * shift, values, 0.4, label=label)
      whole = next(
        (item['metrics'][f't{size}_loss'] for item in rows if item['name'] == WHOLE), None
      )
      if whole is not None:
        axis.axvline(whole, color='gray', linewidth=0.8)
        axis.set_xlim(left=0.8 * whole)
      axis.set_yticks(np.arange(len(rows)) + 0.2, names, fontsize=7)
      axis.invert_yaxis()
      axis.set(title=f'groups of {size}', xlabel='loss of a token')
    axes[0].legend(frameon=False, fontsize=7)
    for kind, label in (('key', 'keys'), ('value', 'values')):
      shares = np.concatenate(
        [compression.energy_shares(getattr(own, kind)) for own in grams.values()]
      )
      share = np.arange(1, shares.shape[1] + 1) / shares.shape[1]
      axes[-1].plot(share, shares.mean(0), label=label)
      axes[-1].fill_between(share, shares.min(0), shares.max(0), alpha=0.2)
    axes[-1].set(xlabel=f'share of the directions of {max(sizes)} heads', ylabel='energy')
    axes[-1].legend(frameon=False, fontsize=8)
    axes[0].figure.suptitle(pictures.title(config), fontsize=9)


if __name__ == '__main__':
  launcher.main('kv_heads')
