"""UP-ViTs: A Unified Pruning Framework for Vision Transformers (Yu & Wu, Science China Inf. Sci. 2023).

arXiv 2111.15127. Everything that has a width in a transformer is pruned: the embedding that all blocks share,
each attention, each MLP. What a channel matters is measured: without it, one at a time, how far do the
predictions for a few images move?

  score = sum over images of KL(softmax(full network) || softmax(network without the channel))

The channels of the lowest scores are cut out until the network has the shape of a given smaller one, of which
it is then an ordinary instance, and which starts its training, under CutMix and distillation from the full
network, from there. Claim: better than that shape trained in the usual way.

  python -m experiments.up_vits
  python -m experiments.up_vits --config=imagenet_deit_tiny --workdir=DIR
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import launcher, networks, pictures, results, runs, supervised
from experiments.harness.networks import Loaded, Network
from experiments.harness.runs import Call, Run, Variables, say
from experiments.harness.sections import Experiment, Recipe, check_batch
from experiments.harness.settings import found_by, identity
from experiments.harness.supervised import Seen
from experiments.protocols.subsets import Subset
from jaxlab import compression, data, losses, parallel
from jaxlab.training import warm_decay_per_epoch

Array = jax.Array

# Rows: title, role, which channels the training starts from, whether the full network teaches.
ROWS = {
  'selected': ('UP-ViT', 'method', 'scores', True),
  'random': ('random channels', 'baseline', 'random', True),
  'drawn': ('drawn anew, distilled', 'baseline', None, True),
  'labels': ('drawn anew, labels alone', 'baseline', None, False),
}
METRICS = ('accuracy', 'averaged', 'untuned', 'parameters', 'macs')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of UP-ViTs.

  Attributes:
    network: the full network.
    target: name and fields of the network whose shape is reached; what it has fewer of is cut.
    proxy: training images that scores are measured on, drawn at random, seen as in the test.
    proxy_batch: images of a pass.
    candidates: channels left out at once, on copies of the batch; more fill a device better.
    recipe: of the training that follows.
    cutmix: alpha of its mixtures, of which each image is at least half its own; 0: none.
    weight: of the distillation, as a mean over images: 0.2 times the 32 images over which the code sums.
    decay: of the average of parameters that is moved once an epoch.
    runs: rows, of `ROWS`.
  """

  network: Network
  target: Mapping[str, Any]
  proxy: Subset = dataclasses.field(default_factory=lambda: Subset(per_class=5))
  proxy_batch: int = 56
  candidates: int = 1
  recipe: Recipe
  cutmix: float = 0.5
  weight: float = 6.4
  decay: float = 0.999
  runs: tuple[str, ...] = tuple(ROWS)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    for name in ('proxy_batch', 'candidates'):
      if getattr(self, name) < 1:
        yield f'{name}={getattr(self, name)}: expected at least 1.'
    for name in ('cutmix', 'weight'):
      if not getattr(self, name) >= 0:
        yield f'{name}={getattr(self, name)}: expected at least 0.'
    if not 0 <= self.decay <= 1:
      yield f'decay={self.decay}: expected a share in [0, 1].'

  @property
  def steps_per_epoch(self) -> int:
    """Optimizer steps of an epoch."""
    return (self.network.data.train_size or 0) // self.recipe.batch_size


def both(config: Settings) -> tuple[nn.Module, nn.Module]:
  """Returns the full network and one of the target's shape."""
  return networks.create(config.network.model), networks.create(config.target)


def sliced(config: Settings, plan: compression.Plan, variables: Variables) -> Variables:
  """Returns the full network's variables, cut to the target's; the scale of scores is that of its heads."""
  full, small = both(config)

  @jax.jit
  def cut(variables: Variables) -> Variables:
    return compression.slice_network(full, variables, plan, same_scores=False)[1]

  return runs.matched(abstract(config, small), cut(variables))


def abstract(config: Settings, model: nn.Module) -> Variables:
  """Returns the shapes of a network's variables."""
  return supervised.abstract_variables(model, config.network.task)


def random_scores(config: Settings) -> dict[str, np.ndarray]:
  """Returns scores that say nothing: the baseline's."""
  full, small = both(config)
  rng, sizes = np.random.default_rng((config.seed, 1)), compression.structure(full).sizes
  drawn = {name: rng.random(sizes.get(name, 1)) for name in compression.shape_names(full, small)}
  return {name: own if name in sizes else own[0] for name, own in drawn.items()}


def score_batch(
  config: Settings, variables: Variables, images: Array, mask: Array
) -> dict[str, Array]:
  """Returns the scores of some images, sums over those that `mask` counts."""
  full, small = both(config)

  def score(pruned: Array, original: Array) -> Array:
    return mask * compression.prediction_divergence(pruned, original, 'original_to_pruned')

  names = compression.shape_names(full, small)
  return compression.removal_scores(
    full, variables, images, names=names, chunk=config.candidates, score=score
  )


def measure(config: Settings, net: Loaded, file: Any) -> dict[str, np.ndarray]:
  """Returns the scores of all channels, from wherever `file` was left.

  Each batch is summed up in float32, all of them in float64.
  """
  rng = np.random.default_rng(config.seed)
  images = config.proxy.draw(rng, net.train)
  decides = {
    name: getattr(config, name) for name in ('seed', 'network', 'target', 'proxy', 'proxy_batch')
  }
  own = json.dumps(identity(decides), sort_keys=True)
  total, done = {}, 0
  if file.exists():
    with file.open('rb') as stream:
      stored = dict(np.load(stream))
    if str(stored.pop('identity')) != own:
      raise ValueError(f'{file} holds scores of other settings: choose another workdir.')
    done, total = int(stored.pop('done')), stored
  score = jax.jit(functools.partial(score_batch, config))
  sharding = parallel.batch_sharding(config.mesh.make())
  index, count = data.process_shard(sharding, config.proxy_batch)
  say(f'scores: {len(images)} images')
  batches = data.epoch_batches(
    images, config.proxy_batch, process_index=index, process_count=count,
    **harness_data.reading(config.network.data, 'test'),
  )  # fmt: skip
  for number, batch in enumerate(batches):
    if number < done:
      continue
    batch = data.to_device(batch, sharding)
    given = config.network.task.inputs(batch), batch['mask']
    for name, value in jax.device_get(score(net.variables, *given)).items():
      total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
    if jax.process_index() == 0:
      partial = file.parent / f'{file.name}.partial'
      with partial.open('wb') as stream:
        np.savez(stream, **total, done=number + 1, identity=own)
      partial.replace(file)
  return total


def training(config: Settings, name: str) -> Run:
  """Returns the training of a row."""
  title, _, start, taught = ROWS[name]
  full, small = both(config)
  steps = config.steps_per_epoch

  def loss(logits: Array, labels: Array, seen: Seen) -> Array:
    # Of mixed images the harness takes it for both labels, by their shares; the teacher's part is the same.
    told = seen.teacher if taught else logits
    weight = config.weight if taught else 0.0
    return losses.mixup_distillation_loss(
      logits, told, labels, labels, 1.0, temperature=1.0, weight=weight, label_weight=1.0
    )

  def mix(key: Array, images: Array, step: Array) -> tuple[Array, Array, Array]:
    del step
    return data.cutmix(key, images, config.cutmix, own_half=True)

  program = supervised.program(
    small, config.network.task, config.recipe, steps, loss=loss,
    teacher=full if taught else None, mix=mix if config.cutmix else None,
    average=warm_decay_per_epoch(config.decay, steps),
  )  # fmt: skip
  decides = {
    'target': config.target,
    'cutmix': config.cutmix,
    'decay': config.decay,
    'start': start,
  }
  if taught:
    decides |= {'weight': config.weight, 'network': config.network}
  if start == 'scores':
    decides['proxy'] = config.proxy
  num_steps = config.recipe.epochs * steps
  decides['augment'] = config.network.augment
  return Run(config, config.network.data, config.recipe, program, num_steps, decides, title)


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  own, batch = config.network.data, config.recipe.batch_size
  yield from results.check_claims(config, ['full', *(row[0] for row in ROWS.values())], METRICS)
  if unknown := [name for name in config.runs if name not in ROWS]:
    yield f'runs: {unknown} are none of {", ".join(ROWS)}.'
  if not config.runs:
    yield f'runs is empty; runs: {", ".join(ROWS)}.'
  for name in ('mixup', 'cutmix'):
    if getattr(config.recipe, name):
      yield f'recipe.{name}: expected 0; cutmix={config.cutmix} is what is mixed.'
  for recipe, name in ((config.recipe, 'recipe'), (config.network.recipe, 'network.recipe')):
    if recipe is not None:
      yield from check_batch(config.mesh, recipe.batch_size, f'{name}.batch_size')
      if (own.train_size or 0) < recipe.batch_size:
        yield f'{name}.batch_size={recipe.batch_size} exceeds data.train_size={own.train_size}.'
  yield from check_batch(config.mesh, config.proxy_batch, 'proxy_batch')
  yield from found_by('proxy', config.proxy.of, own)
  if config.proxy == Subset():
    yield 'proxy: expected total or per_class, images that scores are measured on.'
  if batch <= (own.train_size or 0):
    schedule = config.recipe.schedule.make
    yield from found_by('recipe.schedule', schedule, config.recipe.epochs, config.steps_per_epoch)
  yield from found_by('target', check_target, config)


def check_target(config: Settings) -> None:
  """Raises ValueError unless the target's shape can be cut out of the network."""
  full, _ = both(config)
  made = compression.shape_plan(*both(config), random_scores(config))
  jax.eval_shape(functools.partial(sliced, config, made), abstract(config, full))


def programs(config: Settings, facts: None = None) -> dict[str, Run | Call]:
  """Returns the trainings by the names of `config.runs`, that of the full network, and the scores."""
  del facts
  found: dict[str, Run | Call] = {name: training(config, name) for name in config.runs}
  if not config.network.pretrained:
    found['full'] = networks.training(config, config.network, 'in full')

  def make(mesh: jax.sharding.Mesh) -> tuple[Any, tuple[Any, ...]]:
    full, _ = both(config)
    variables = abstract(config, full)
    shardings = parallel.fsdp_shardings(variables, mesh)
    given = jax.tree.map(
      lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), variables, shardings
    )  # fmt: skip
    shape = (config.proxy_batch, *config.network.data.view)
    images = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=parallel.batch_sharding(mesh))
    mask = jax.ShapeDtypeStruct(shape[:1], bool, sharding=images.sharding)
    return functools.partial(score_batch, config), (given, images, mask)

  return found | {'scores': Call(make)}


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Scores the channels of the full network, cuts it, and trains what is left next to other beginnings."""
  full, small = both(config)
  net = networks.load(config, config.network, workdir / 'full')
  plans = {}
  scores = measure(config, net, workdir / 'scores.npz')
  plans['scores'] = compression.shape_plan(full, small, scores)
  plans['random'] = compression.shape_plan(full, small, random_scores(config))
  judge = functools.partial(networks.accuracy, config, config.network.data)

  def accuracy(model: nn.Module, variables: Variables) -> float:
    return judge(model, config.network.task, variables, net.test)

  image = jax.ShapeDtypeStruct((1, *config.network.data.view), jnp.float32)

  def size(model: nn.Module) -> dict[str, float]:
    shapes = abstract(config, model)
    macs = compression.multiply_accumulates(model, shapes, image)
    return {'parameters': compression.num_parameters(shapes) / 1e6, 'macs': macs / 1e6}

  rows = [
    results.row('full', 'reference', {'accuracy': accuracy(full, net.variables), **size(full)})
  ]
  for name in config.runs:
    title, role, start, taught = ROWS[name]
    given: dict[str, Any] = {'frozen': {'teacher': net.variables}} if taught else {}
    metrics = {}
    if start is not None:
      plans[start].save(workdir / f'plan_{start}.json')
      given['start'] = sliced(config, plans[start], net.variables)
      metrics['untuned'] = accuracy(small, given['start'])
    trained = runs.train(training(config, name), net.train, workdir / name, **given)
    averaged = {**trained.variables, 'params': trained.state.extra['average']}
    metrics |= {
      'accuracy': accuracy(small, trained.variables),
      'averaged': accuracy(small, averaged),
    }
    rows.append(results.row(title, role, {**metrics, **size(small)}))
  draw(config, rows, scores, plans['scores'], workdir / 'scores_and_accuracy.png')
  unit = 'accuracies in %; millions of parameters and of multiply-accumulates an image'
  return results.results(config, rows, METRICS, unit)


def draw(
  config: Settings,
  rows: Sequence[Mapping[str, Any]],
  scores: Mapping[str, np.ndarray],
  plan: compression.Plan,
  picture: pathlib.Path,
) -> None:
  """Draws the sorted scores of the groups with what stays, and the rows' accuracies."""
  own = compression.structure(networks.create(config.network.model))
  with pictures.drawn(picture, 1, 2, size=(11, 4)) as (left, right):
    for name in plan.sizes:
      group, values = own.groups[name], np.sort(scores[name])
      kind = 0 if group.norms else 1 if group.scaled else 2
      label = ('embedding', 'attention', 'MLP')[kind]
      known = label in left.get_legend_handles_labels()[1]
      share = np.linspace(0, 100, len(values))
      floor = max(values.max() * 1e-6, 1e-12)
      left.semilogy(
        share, np.maximum(values, floor), color=f'C{kind}', alpha=0.7, label=None if known else label
      )  # fmt: skip
    left.set_xlabel('channels of a group, from the least important (%)')
    left.set_ylabel('KL divergence without the channel')
    left.legend(frameon=False)
    found = {item['name']: item['metrics']['accuracy'] for item in rows}
    bars = right.barh(list(found), list(found.values()), color='C0')
    right.bar_label(bars, fmt='%.1f', padding=2)
    right.set_xlim(max(0, min(found.values()) - 5), max(found.values()) + 3)
    right.invert_yaxis()
    right.set_xlabel('test accuracy (%)')
    left.figure.suptitle(pictures.title(config))


if __name__ == '__main__':
  launcher.main('up_vits')
