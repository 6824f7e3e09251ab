"""Fine-tuning a pre-trained network anew in every few-shot episode, as one compiled program.

Episodes are split over the devices, each of which works through its own. Where images are not augmented, what
the frozen stages give is computed once for all of them.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments import networks, training
from jaxlab import data, models, parallel
from jaxlab.data.protocols.few_shot import Episode
from jaxlab.data.sources.subset import subset
from jaxlab.losses.classification import label_smoothing_cross_entropy
from jaxlab.losses.contrastive import normalize
from jaxlab.losses.stability import acsr_loss
from jaxlab.models.classifier_heads import WeightNormHead
from jaxlab.models.resnet import ResNet
from jaxlab.models.wide_resnet import WideResNet
from jaxlab.training import make_optimizer, map_batches

Array = jax.Array
PyTree = Any

BATCH_AXES = PartitionSpec(parallel.mesh.BATCH_AXES)


class Adaptation(NamedTuple):
  """What of the network is fine-tuned (AC), and where a frozen beginning can be cut off.

  Attributes:
    patterns: regular expressions of the trained parameters' paths.
    mode: what the backbone's argument `train` is in training.
    hooks: further hooks of the training passes.
    start: the stage that cached activations go into; None: the network is run from the images.
  """

  patterns: tuple[str, ...]
  mode: Any
  hooks: tuple[models.Hook, ...] = ()
  start: str | None = None


class Pools(NamedTuple):
  """What all episodes read: the inputs of novel and base images, and features of the latter.

  Attributes:
    novel: `[novel images, ...]`, stored images or activations that go into the first trained stage.
    base: `[base images, ...]`, likewise.
    frozen: `[base images, features]`, of the pre-trained network.
  """

  novel: Array
  base: Array
  frozen: Array


def network(config: ConfigDict) -> tuple[nn.Module, nn.Module]:
  """Returns the backbone as it is fine-tuned, and the classifier of an episode."""
  backbone = models.create(**{**config.network.backbone.model, 'num_classes': None})
  if isinstance(backbone, WideResNet):
    backbone = backbone.clone(dropout=config.finetune.dropout)
  return backbone, WeightNormHead(config.episodes.num_ways)


def adaptation(config: ConfigDict, backbone: nn.Module) -> Adaptation:
  """Returns what `finetune.trained` names: 'classifier', 'last_stage' (and a final norm) or 'all'.

  Norms and dropout of all else are in eval mode.

  Raises:
    ValueError: for another name, or a backbone that is neither `WideResNet` nor `ResNet`.
  """
  choice = config.finetune.trained
  if choice not in ('classifier', 'last_stage', 'all'):
    raise ValueError(f"finetune.trained={choice!r}: expected 'classifier', 'last_stage' or 'all'.")
  if isinstance(backbone, WideResNet):
    stages = {'classifier': (), 'last_stage': backbone.stages[-2:], 'all': backbone.stages}[choice]
    patterns = ('head/.*', *(f'backbone/{stage}/.*' for stage in stages))
    cached = config.finetune.augment is None and choice != 'all'
    return Adaptation(patterns, stages, start=(*stages, 'bn1')[0] if cached else None)
  if not isinstance(backbone, ResNet):
    raise ValueError(
      f'the backbone must be a WideResNet or a ResNet, got {type(backbone).__name__}.'
    )
  last, hooks = rf'layer{len(backbone.stage_sizes)}_\d+', ()
  trained = {'classifier': (), 'last_stage': (f'backbone/{last}/.*',), 'all': ('backbone/.*',)}
  if choice == 'last_stage':
    frozen_norms = rf'(?!{last}/)(.*/)?(bn\d|downsample_1)'
    hooks = (models.Hook(frozen_norms, call=lambda site, call, x, *_, **__: call(x, False)),)
  return Adaptation(('head/.*', *trained[choice]), choice != 'classifier', hooks)


def view(config: ConfigDict, images: Array) -> Array:
  """Returns the network's view of stored images that are not augmented: the center, normalized."""
  own = config.network.backbone.data
  size = (own.image_size, own.image_size)
  images = jax.vmap(functools.partial(data.center_crop, size=size))(images)
  return data.normalize(data.to_float(images), own.mean, own.std)


def augmented(config: ConfigDict, key: Array, images: Array) -> Array:
  """Returns one augmented view of each stored image (`finetune.augment`)."""
  own = config.network.backbone.data
  augment = data.siamese_augment(
    own.image_size, **config.finetune.augment, mean=own.mean, std=own.std
  )
  return data.draw_views(augment, jax.random.split(key, len(images)), images, 1)[0]


def finetune(
  config: ConfigDict, with_base: bool, variables: PyTree, pools: Pools, task: Mapping[str, Array]
) -> dict[str, Array]:
  """Fine-tunes a copy of the pre-trained network on one episode, and classifies its queries.

  A step: the pass over the support images; then, `with_base`, a second pass over base images drawn with
  replacement, which has its own batch statistics and moves the running ones after the first; one step of SGD
  with momentum, which starts at zero, on the trained parameters alone.

  Args:
    config: the configuration.
    with_base: False leaves the pass over base images, and the regularizer, away.
    variables: `{'params', 'batch_stats'}` of the pre-trained backbone.
    pools: what all episodes read.
    task: `support`, `query` (positions in the novel pool), `support_labels`; scalars `episode`, `member`
      (who draws), `beta`, and `low`, `high` (the part of the base pool that is drawn from).

  Returns:
    `probabilities` `[queries, ways]`, and `cosine`, the mean one of `config.cosine_images` base images'
    features with the frozen ones, all in eval mode.
  """
  options = config.finetune
  backbone, head = network(config)
  adapt = adaptation(config, backbone)
  key = jax.random.fold_in(jax.random.key(config.seed), task['member'])
  head_key, key = jax.random.split(key)
  key = jax.random.fold_in(key, task['episode'])
  blank = jnp.zeros((1, pools.frozen.shape[-1]))
  params = {'backbone': variables['params'], 'head': head.init(head_key, blank)['params']}
  params = traverse_util.flatten_dict(params, sep='/')
  trained = {
    path: leaf
    for path, leaf in params.items()
    if any(re.fullmatch(pattern, path) for pattern in adapt.patterns)
  }
  optimizer = make_optimizer(**options.optimizer)
  start = {} if adapt.start is None else {'start': adapt.start}

  def merged(trained: PyTree) -> PyTree:
    return traverse_util.unflatten_dict({**params, **trained}, sep='/')

  def inputs(pool: Array, index: Array) -> Array:
    return pool[index] if adapt.start else view(config, pool[index])

  def features(params: PyTree, stats: PyTree, x: Array, key: Array) -> tuple[Array, PyTree]:
    own = {'params': params['backbone'], 'batch_stats': stats}
    rngs = {'dropout': key}
    e, state = models.apply(
      backbone, own, x, adapt.mode, hooks=adapt.hooks, mutable=['batch_stats'], rngs=rngs, **start
    )
    return e, dict(state)['batch_stats']

  def step(carry: PyTree, index: Array) -> tuple[PyTree, None]:
    trained, stats, opt_state = carry
    keys = jax.random.split(jax.random.fold_in(key, index), 4)
    if options.augment is None:
      support = inputs(pools.novel, task['support'])
    else:
      support = augmented(config, keys[0], pools.novel[task['support']])
    drawn = jax.random.randint(keys[1], (options.base_batch,), task['low'], task['high'])

    def objective(trained: PyTree) -> tuple[Array, PyTree]:
      own = merged(trained)
      e, moved = features(own, stats, support, keys[2])
      logits = head.apply({'params': own['head']}, e)
      labels = task['support_labels']
      if not with_base:
        losses = label_smoothing_cross_entropy(logits, labels, options.smoothing)
        return jnp.mean(losses), moved
      e, moved = features(own, moved, inputs(pools.base, drawn), keys[3])
      regularizer = {'beta': task['beta'], 'smoothing': options.smoothing}
      return acsr_loss(logits, labels, e, pools.frozen[drawn], **regularizer)[0], moved

    gradient, stats = jax.grad(objective, has_aux=True)(trained)
    updates, opt_state = optimizer.update(gradient, opt_state, trained)
    return (optax.apply_updates(trained, updates), stats, opt_state), None

  begin = (trained, variables['batch_stats'], optimizer.init(trained))
  (trained, stats, _), _ = jax.lax.scan(step, begin, jnp.arange(options.steps))

  own = merged(trained)
  final = {'params': own['backbone'], 'batch_stats': stats}
  e = backbone.apply(final, inputs(pools.novel, task['query']), False, **start)
  spread = np.arange(config.cosine_images) * len(pools.frozen) // config.cosine_images
  held = backbone.apply(final, inputs(pools.base, spread), False, **start)
  logits = head.apply({'params': own['head']}, e).astype(jnp.float32)
  cosines = jnp.sum(normalize(held) * normalize(pools.frozen[spread]), -1)
  return {'probabilities': jax.nn.softmax(logits), 'cosine': jnp.mean(cosines)}


def finetune_all(
  config: ConfigDict, with_base: bool, mesh: Mesh
) -> Callable[..., dict[str, Array]]:
  """Returns `finetune` over tasks `[tasks, ...]`, jitted; each device works through its own, in turn.

  `finetune.at_once` tasks are worked on together, as one batch.
  """

  def own_tasks(variables: PyTree, pools: Pools, tasks: PyTree) -> dict[str, Array]:
    one = functools.partial(finetune, config, with_base, variables, pools)
    return jax.lax.map(one, tasks, batch_size=config.finetune.at_once)

  whole = PartitionSpec()
  return jax.jit(
    jax.shard_map(
      own_tasks,
      mesh=mesh,
      in_specs=(whole, whole, BATCH_AXES),
      out_specs=BATCH_AXES,
      check_vma=False,
    )
  )


def only_drawn(novel: data.Source, drawn: Episode) -> tuple[data.Source, Episode]:
  """Returns the novel images that occur in an episode, and the episodes' positions among them."""
  used = np.unique(np.concatenate([drawn.support, drawn.query], axis=1))
  moved = {name: np.searchsorted(used, getattr(drawn, name)) for name in ('support', 'query')}
  return subset(novel, used), drawn._replace(**moved)


def make_pools(
  config: ConfigDict, variables: PyTree, base: data.Source, novel: data.Source, mesh: Mesh
) -> Pools:
  """Returns the pools; base images are permuted once, so that contiguous parts are random ones."""
  backbone, _ = network(config)
  adapt = adaptation(config, backbone)
  own = networks.section(config, 'backbone')

  @jax.jit
  def prepare(variables, batch):
    x = view(config, batch['image'])
    stored = batch['image']
    if adapt.start:
      stored = x = backbone.apply(variables, x, stop=adapt.start)
    rest = {} if adapt.start is None else {'start': adapt.start}
    return stored, backbone.apply(variables, x, **rest).astype(jnp.float32)

  order = np.random.default_rng(config.seed).permutation(len(base))[: config.base_limit]
  reading = {'batch_size': config.eval_batch_size, 'mesh': mesh, **training.reading(own, 'train')}
  (base_inputs, frozen), (novel_inputs, _) = (
    map_batches(functools.partial(prepare, variables), source, **reading)
    for source in (subset(base, order), novel)
  )
  pools = Pools(novel_inputs, base_inputs, frozen)
  return jax.device_put(pools, NamedSharding(mesh, PartitionSpec()))


def make_tasks(drawn: Episode, beta: float, members: int, num_base: int) -> list[PyTree]:
  """Returns the tasks `[episodes, ...]` of each member of an ensemble (of a single network: one).

  The base pool is cut into `members` contiguous parts; the last one takes the remainder.

  Raises:
    ValueError: if there are fewer base images than members.
  """
  if members > num_base:
    raise ValueError(f'members={members} exceeds the {num_base} base images: no part for each.')
  count, part = len(drawn.support), num_base // members

  def tasks(member: int) -> PyTree:
    high = num_base if member == members - 1 else (member + 1) * part
    fixed = {'member': member, 'low': member * part, 'high': high, 'beta': beta}
    each = {'episode': np.arange(count)}
    each |= {name: getattr(drawn, name) for name in ('support', 'support_labels', 'query')}
    each |= {name: np.full(count, value) for name, value in fixed.items()}
    return {k: v.astype(np.float32 if k == 'beta' else np.int32) for k, v in each.items()}

  return [tasks(member) for member in range(members)]


def num_base(config: ConfigDict) -> int:
  """Returns the number of base images that episodes draw from."""
  available = config.network.backbone.data.train_size
  return min(config.base_limit or available, available)


def abstract(config: ConfigDict, mesh: Mesh) -> tuple[PyTree, Pools, PyTree]:
  """Returns the arguments of `finetune_all`'s function as shapes: one task a device."""
  own = config.network.backbone.data
  ways, shots = config.episodes.num_ways, config.episodes.num_shots
  backbone, _ = network(config)
  adapt = adaptation(config, backbone)
  variables = models.abstract_variables(backbone, (own.image_size, own.image_size, own.channels))

  def shapes(variables, images):
    x = view(config, images)
    into = backbone.apply(variables, x, stop=adapt.start) if adapt.start else images
    return into, backbone.apply(variables, x)

  stored = jax.ShapeDtypeStruct((1, *own.stored_image), jnp.uint8)
  into, features = jax.eval_shape(shapes, variables, stored)
  num_novel = min(
    own.novel_size, config.episodes.count * ways * (shots + config.episodes.num_queries)
  )
  pool = {
    name: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype)
    for name, count, leaf in (
      ('novel', num_novel, into),
      ('base', num_base(config), into),
      ('frozen', num_base(config), features),
    )
  }
  count = mesh.shape['data'] * mesh.shape['fsdp']
  sizes = {'support': ways * shots, 'support_labels': ways * shots}
  sizes['query'] = ways * config.episodes.num_queries
  tasks = {name: jax.ShapeDtypeStruct((count, size), jnp.int32) for name, size in sizes.items()}
  tasks |= {
    name: jax.ShapeDtypeStruct((count,), jnp.float32 if name == 'beta' else jnp.int32)
    for name in ('episode', 'member', 'low', 'high', 'beta')
  }
  shardings = (PartitionSpec(), PartitionSpec(), BATCH_AXES)
  return tuple(
    jax.tree.map(
      lambda leaf, spec=spec: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
      ),
      tree,
    )
    for tree, spec in zip((variables, Pools(**pool), tasks), shardings, strict=True)
  )
