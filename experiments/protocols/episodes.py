"""Few-shot episodes: a network learns from base classes, then is fine-tuned anew in every episode.

Episodes are one compiled program, split over the devices, each of which works through its own. Where images
are not augmented, what the frozen beginning of the network gives is computed once for all of them. What a
step minimizes is the caller's function of what it sees (`Seen`): the support images and, if it asks for
them, images of base classes with their features by the pre-trained network.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.harness import data as harness_data
from experiments.harness import networks, runs
from experiments.harness.runs import Call, Run, Variables
from experiments.harness.tasks import ImageTask
from experiments.protocols.episode_settings import Settings
from experiments.protocols.few_shot_data import Sources
from jaxlab import data, losses, models, parallel
from jaxlab.data.protocols.few_shot import Episode
from jaxlab.training import Initial, LossState, Out, make_program, map_batches

Array = jax.Array
PyTree = Any

BATCH_AXES = PartitionSpec(parallel.mesh.BATCH_AXES)


class Seen(NamedTuple):
  """What the loss of a step sees.

  Attributes:
    logits: `[support, num_ways]`, of the support images.
    labels: `[support]`.
    features: `[batch_size, dim]`, of base images by the network as it is; None: there is no pass over them.
    frozen: `[batch_size, dim]`, of the same images by the pre-trained network.
    numbers: those of the task (`tasks`), scalars by name.
  """

  logits: Array
  labels: Array
  features: Array | None
  frozen: Array | None
  numbers: Mapping[str, Array]


class Method(NamedTuple):
  """What is done in an episode.

  Attributes:
    head: the classifier of features.
    loss: `Seen -> scalar`, minimized.
    with_base: whether there is a pass over base images in every step.
    numbers: names of those that a task gives to the loss, so that one program serves all their values.
    decides: sections and plain values, by name, that decide head and loss besides.
  """

  head: nn.Module
  loss: Callable[[Seen], Array]
  with_base: bool = False
  numbers: tuple[str, ...] = ()
  decides: Mapping[str, Any] = {}


class Pools(NamedTuple):
  """What all episodes read.

  Attributes:
    novel: `[novel images, ...]`, stored images, or activations that go into the first trained stage.
    base: `[base images, ...]`, likewise.
    frozen: `[base images, dim]`, features by the pre-trained network.
  """

  novel: Array
  base: Array
  frozen: Array


def pretraining(config: Settings) -> Run:
  """Returns the training of the network on the base classes."""
  own = networks.Network(
    model={**config.model, 'num_classes': config.data.num_classes},
    data=config.data,
    augment=config.augment,
    recipe=config.recipe,
  )
  return networks.training(config, own, 'on base classes')


def pretrained(config: Settings, base: data.Source, folder: Any) -> Variables:
  """Returns the variables of the network without a classifier, on all devices.

  Raises:
    ValueError: for a checkpoint of another network.
  """
  shapes = models.abstract_variables(config.backbone, config.data.view)
  if config.checkpoint:
    weights = models.read_state_dict(config.checkpoint)
    weights = {re.sub(r'^((module|feature)\.)+', '', name): w for name, w in weights.items()}
    variables = models.from_torch(shapes, weights, ignore=(r'(linear|fc|classifier)\..*',))
  else:
    trained = runs.train(pretraining(config), base, folder).variables
    variables = runs.matched(shapes, trained)
  return jax.device_put(variables, parallel.replicated(config.mesh.make()))


def draw(config: Settings, novel: data.Source) -> tuple[data.Source, Episode]:
  """Returns the novel images that occur in an episode, and the episodes, positions among them.

  Raises:
    ValueError: for episodes that the images are too few for.
  """
  own = config.episodes
  drawn = data.sample_episodes(
    config.seed, data.source_labels(novel), own.count, own.num_ways, own.num_shots, own.num_queries
  )
  used = np.unique(np.concatenate([drawn.support, drawn.query], axis=1))
  moved = {name: np.searchsorted(used, getattr(drawn, name)) for name in ('support', 'query')}
  return data.subset(novel, used), drawn._replace(**moved)


def tasks(
  drawn: Episode, rows: tuple[int, int], member: int = 0, numbers: Mapping[str, float] | None = None
) -> PyTree:
  """Returns the arguments of `fine_tune` for every episode, `[episodes, ...]`.

  Args:
    drawn: the episodes.
    rows: first base image that is drawn from, and the one behind the last.
    member: of an ensemble; each draws a classifier of its own.
    numbers: for the loss.
  """
  count = len(drawn.support)
  fixed = {'member': member, 'low': rows[0], 'high': rows[1]}
  each = {'episode': np.arange(count), **{k: np.full(count, v) for k, v in fixed.items()}}
  each |= {name: getattr(drawn, name) for name in ('support', 'support_labels', 'query')}
  each = {name: values.astype(np.int32) for name, values in each.items()}
  given = {name: np.full(count, value, np.float32) for name, value in (numbers or {}).items()}
  return {**each, 'numbers': given}


def view(config: Settings, images: Array) -> Array:
  """Returns the network's view of stored images that are not augmented: the center, normalized."""
  size = config.data.view[:2]
  center = jax.vmap(functools.partial(data.center_crop, size=size))(images)
  return ImageTask.of(config.data).inputs({'image': center})


def fine_tune(
  config: Settings, method: Method, variables: PyTree, pools: Pools, task: Mapping[str, Any]
) -> dict[str, Array]:
  """Fine-tunes a copy of the pre-trained network on one episode, and classifies its queries.

  A step: the pass over the support images; then, with `method.with_base`, a pass over base images drawn with
  replacement, which has its own batch statistics and moves the running ones after the first; one step of the
  optimizer on what is trained alone.

  Args:
    config: the settings.
    method: what is done.
    variables: `{'params', 'batch_stats'}` of the pre-trained backbone.
    pools: what all episodes read.
    task: `support`, `query` (positions in the novel pool), `support_labels`; scalars `episode`, `member`
      (who draws), `low`, `high` (the base images that are drawn from); `numbers`.

  Returns:
    `probabilities` `[queries, num_ways]`, and `cosine`, the mean one of `base.judged` base images' features
    with the frozen ones, all in evaluation mode.
  """
  own, backbone, part = config.fine_tuning, config.backbone, config.part
  augmented = ImageTask.of(config.data, own.augment).augmented
  key = jax.random.fold_in(jax.random.key(config.seed), task['member'])
  head_key, key = jax.random.split(key)
  key = jax.random.fold_in(key, task['episode'])
  blank = jnp.zeros((1, pools.frozen.shape[-1]))
  params = {'backbone': variables['params'], 'head': method.head.init(head_key, blank)['params']}
  flat = traverse_util.flatten_dict(params, sep='/')
  trained = {
    path: leaf
    for path, leaf in flat.items()
    if any(re.fullmatch(pattern, path) for pattern in part.patterns)
  }
  start = {} if part.start is None else {'start': part.start}

  def merged(trained: PyTree) -> PyTree:
    return traverse_util.unflatten_dict({**flat, **trained}, sep='/')

  def inputs(pool: Array, index: Array) -> Array:
    return pool[index] if part.start else view(config, pool[index])

  def features(params: PyTree, stats: PyTree, x: Array, key: Array) -> tuple[Array, PyTree]:
    e, state = models.apply(
      backbone, {'params': params['backbone'], 'batch_stats': stats}, x, part.mode,
      hooks=part.hooks, mutable=['batch_stats'], rngs={'dropout': key}, **start,
    )  # fmt: skip
    return e, dict(state)['batch_stats']

  def loss(
    trained: PyTree, state: LossState, batch: Mapping[str, Array], key: Array
  ) -> tuple[Array, Out]:
    keys, params = jax.random.split(key, 4), merged(trained)
    if own.augment.kind == 'none':
      support = inputs(pools.novel, batch['support'])
    else:
      each = jax.random.split(keys[0], len(batch['support']))
      support = augmented(each, {'image': pools.novel[batch['support']]})
    e, stats = features(params, state.model_state, support, keys[2])
    logits = method.head.apply({'params': params['head']}, e)
    moved = frozen = None
    if method.with_base:
      drawn = jax.random.randint(keys[1], (config.base.batch_size,), task['low'], task['high'])
      moved, stats = features(params, stats, inputs(pools.base, drawn), keys[3])
      frozen = pools.frozen[drawn]
    seen = Seen(logits, batch['labels'], moved, frozen, task['numbers'])
    return method.loss(seen), Out(model_state=stats)

  optimizer, stats = own.optimizer.make(own.learning_rate), variables['batch_stats']
  batch = {'support': task['support'], 'labels': task['support_labels']}
  program = make_program(lambda key: Initial(trained, stats, key=key), loss, optimizer, batch)
  state, _ = jax.lax.scan(
    lambda state, _: (program.step(state, {}, batch)[0], None),
    program.init(key),
    length=own.steps,
  )

  params = merged(state.params)
  final = {'params': params['backbone'], 'batch_stats': state.model_state}
  e = backbone.apply(final, inputs(pools.novel, task['query']), False, **start)
  judged = np.arange(config.base.judged) * len(pools.frozen) // config.base.judged
  held = backbone.apply(final, inputs(pools.base, judged), False, **start)
  logits = method.head.apply({'params': params['head']}, e).astype(jnp.float32)
  cosine = losses.stability_loss(held, pools.frozen[judged])
  return {'probabilities': jax.nn.softmax(logits), 'cosine': cosine}


def program(config: Settings, method: Method) -> Call:
  """Returns `fine_tune` over tasks `[tasks, ...]`: `(variables, pools, tasks) -> results [tasks, ...]`."""

  def make(mesh: Mesh) -> tuple[Callable[..., dict[str, Array]], tuple[PyTree, ...]]:
    def own_tasks(variables: PyTree, pools: Pools, tasks: PyTree) -> dict[str, Array]:
      one = functools.partial(fine_tune, config, method, variables, pools)
      return jax.lax.map(one, tasks, batch_size=config.fine_tuning.at_once)

    specs = (PartitionSpec(), PartitionSpec(), BATCH_AXES)
    function = jax.shard_map(
      own_tasks, mesh=mesh, in_specs=specs, out_specs=BATCH_AXES, check_vma=False
    )
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    return function, parallel.abstract(abstract(config, method.numbers, mesh), shardings)

  return Call(make)


def abstract(config: Settings, numbers: Sequence[str], mesh: Mesh) -> tuple[PyTree, Pools, PyTree]:
  """Returns the shapes of variables, pools and tasks, one task a device."""
  own, shots = config.episodes, config.episodes.num_ways * config.episodes.num_shots
  queries, parts = own.num_ways * own.num_queries, mesh.shape['data'] * mesh.shape['fsdp']
  variables = models.abstract_variables(config.backbone, config.data.view)
  image = jax.ShapeDtypeStruct((1, *config.data.stored_image), jnp.dtype(config.data.dtype))
  into, features = jax.eval_shape(functools.partial(stored, config), variables, image)
  num_novel = min(config.data.novel_size, own.count * (shots + queries))
  counts = Pools(num_novel, config.num_base, config.num_base)
  pools = jax.tree.map(
    lambda count, leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype),
    counts,
    Pools(into, into, features),
  )
  empty = Episode(*(np.zeros((parts, size)) for size in (shots, shots, queries, queries, 0)))
  drawn = tasks(empty, (0, 0), numbers=dict.fromkeys(numbers, 0.0))
  return variables, pools, jax.eval_shape(lambda: drawn)


def stored(config: Settings, variables: PyTree, images: Array) -> tuple[Array, Array]:
  """Returns what episodes read of stored images, and their features by the pre-trained network."""
  backbone, start, x = config.backbone, config.part.start, view(config, images)
  if start is None:
    return images, backbone.apply(variables, x).astype(jnp.float32)
  x = backbone.apply(variables, x, stop=start)
  return x, backbone.apply(variables, x, start=start).astype(jnp.float32)


def make_pools(config: Settings, variables: Variables, sources: Sources) -> Pools:
  """Returns the pools; base images are permuted once, so that contiguous rows are random ones."""
  mesh = config.mesh.make()
  fn = jax.jit(functools.partial(stored, config))
  order = np.random.default_rng(config.seed).permutation(len(sources.base))[: config.base.limit]
  (base, frozen), (novel, _) = (
    map_batches(
      lambda batch: fn(variables, batch['image']),
      source,
      batch_size=config.eval_batch_size,
      mesh=mesh,
      **harness_data.reading(config.data, split),
    )
    for source, split in ((data.subset(sources.base, order), 'train'), (sources.novel, 'test'))
  )
  return jax.device_put(Pools(novel, base, frozen), parallel.replicated(mesh))
