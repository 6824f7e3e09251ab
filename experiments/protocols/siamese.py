"""Siamese methods: an encoder, perhaps a predictor behind it, and what its predictions are compared with."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from experiments.harness import networks
from experiments.harness.runs import Variables
from jaxlab import losses, models
from jaxlab.training import Initial, TrainState

Array = jax.Array
PyTree = Any
Views = list[Array]

# Methods that others build on, and their names.
BASELINES = {'simsiam': 'SimSiam', 'byol': 'BYOL', 'moco': 'MoCo v2'}


@dataclasses.dataclass(frozen=True)
class Heads:
  """Sizes: of the projector inside and at its end, and of the predictor inside where there is one."""

  hidden: int = 2048
  features: int = 2048
  predictor: int = 512


@dataclasses.dataclass(frozen=True)
class Momentum:
  """A momentum encoder, and the queue of its features where the method has one.

  Attributes:
    momentum: share of the momentum encoder that a step keeps.
    queue_size: past features.
    temperature: of the cross-entropy over them.
  """

  momentum: float = 0.99
  queue_size: int = 4096
  temperature: float = 0.2

  def check(self) -> Any:
    """Yields what is wrong with the values."""
    if not 0 <= self.momentum <= 1:
      yield f'momentum={self.momentum}: expected a share in [0, 1].'
    if self.queue_size < 1 or self.temperature <= 0:
      yield f'queue_size={self.queue_size}, temperature={self.temperature}: expected positive numbers.'


class Networks(NamedTuple):
  """The trained modules: an encoder, and a predictor where the method has one."""

  encoder: nn.Module
  predictor: nn.Module | None


def backbone_variables(variables: Variables) -> Variables:
  """Returns the backbone's own variables out of those of siamese networks."""
  return {
    kind: variables[kind]['encoder']['backbone']
    for kind in ('params', 'batch_stats')
    if 'backbone' in variables[kind]['encoder']
  }


class Online(NamedTuple):
  """What a pass of the online network over the views gives.

  Attributes:
    projections: of each view, in at least float32.
    predictions: likewise; the projections where there is no predictor.
    batch_stats: running statistics behind the pass.
    collections: what else the encoder's modules or hooks left.
  """

  projections: list[Array]
  predictions: list[Array]
  batch_stats: PyTree
  collections: dict[str, PyTree]


def online_pass(
  nets: Networks,
  params: PyTree,
  batch_stats: PyTree,
  views: Views,
  *,
  given: Mapping[str, PyTree] | None = None,
  mutable: Sequence[str] = (),
  hooks: Sequence[models.Hook] = (),
) -> Online:
  """Runs encoder and predictor over the views in train mode.

  Args:
    nets: the modules.
    params: `{'encoder', 'predictor'}`.
    batch_stats: running statistics, same keys.
    views: arrays `[batch, height, width, channels]`, one forward call each: batch statistics are per view.
    given: further collections of the encoder.
    mutable: collections that the encoder's calls leave, besides the running statistics.
    hooks: around the encoder's modules.
  """
  stats = batch_stats['encoder']
  variables = {'params': params['encoder'], 'batch_stats': stats, **(given or {})}
  mutable = ('batch_stats', *mutable)
  z, left = models.apply_in_turn(nets.encoder, variables, views, mutable=mutable, hooks=hooks)
  new, p = {'encoder': left.pop('batch_stats', {})}, z
  if nets.predictor is not None:
    variables = {'params': params['predictor'], 'batch_stats': batch_stats['predictor']}
    p, changed = models.apply_in_turn(nets.predictor, variables, z)
    new['predictor'] = changed['batch_stats']
  return Online(wide(z), wide(p), new, left)


class Seen(NamedTuple):
  """What the online network is asked in a step.

  Attributes:
    views: that it sees.
    targets: features that its predictions are compared with; None: its own projections of the other view.
    loss: `(predictions, targets) -> scalar`.
    extra: what the method carries along, as the step leaves it.
  """

  views: Views
  targets: list[Array] | None
  loss: Callable[[list[Array], list[Array]], Array]
  extra: PyTree


class Targets(NamedTuple):
  """Where targets come from.

  Attributes:
    init: `(variables of the encoder, key) -> extra`.
    see: `(encoder, extra, views, key) -> Seen`.
    after: moves the momentum encoder behind every step; None: there is none.
  """

  init: Callable[[Variables, Array], PyTree]
  see: Callable[[nn.Module, PyTree, Views, Array], Seen]
  after: Callable[[TrainState], TrainState] | None = None


def init(
  nets: Networks, targets: Targets, images: Array, streams: Sequence[str] = ()
) -> Callable[[Array], Initial]:
  """Returns `key -> Initial`, which draws networks, targets, and the base keys of every step.

  Those are `'views'`, `streams`, and `'order'` (for `Targets.see`).

  Args:
    nets: the modules.
    targets: of the method.
    images: of any values, `[batch, height, width, channels]`.
    streams: names of what else a step draws.
  """
  names = ('views', *streams, 'order')

  def start(key: Array) -> Initial:
    encoder_key, predictor_key, targets_key, key = jax.random.split(key, 4)
    z, encoder = nets.encoder.init_with_output(encoder_key, images, train=True)
    own = {'encoder': encoder}
    if nets.predictor is not None:
      blank = jnp.zeros(z.shape, z.dtype)
      own['predictor'] = nets.predictor.init(predictor_key, blank, train=True)
    params, stats = (
      {name: variables.get(kind, {}) for name, variables in own.items()}
      for kind in ('params', 'batch_stats')
    )
    extra = targets.init(dict(encoder), targets_key)
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    return Initial(params, {'batch_stats': stats}, extra, keys)

  return start


def siamese_loss(predictions: list[Array], targets: list[Array]) -> Array:
  """Returns `(D(p1, z2) + D(p2, z1)) / 2` with `D` the mean negative cosine; targets get no gradient."""
  return losses.simsiam_loss(*predictions, *targets)


def own_projections() -> Targets:
  """Returns the targets of a single network: its projections of the other view, without gradient."""
  return Targets(
    lambda variables, key: {},
    lambda encoder, extra, views, key: Seen(views, None, siamese_loss, extra),
  )


def momentum_encoder(momentum: float) -> Targets:
  """Returns the targets of an encoder that follows the online one.

  `target <- momentum * target + (1 - momentum) * online` over parameters alone, behind every step; its
  running statistics are its own, from its passes in train mode.
  """

  def see(encoder: nn.Module, extra: PyTree, views: Views, key: Array) -> Seen:
    del key
    targets, extra = target_pass(encoder, extra, views)
    return Seen(views, targets, siamese_loss, extra)

  return Targets(lambda variables, key: {'target': variables}, see, follow(momentum))


def momentum_queue(momentum: float, size: int, features: int, temperature: float) -> Targets:
  """Returns the targets of a momentum encoder next to a queue of its past features.

  The online network sees the first view, the momentum encoder the second: its feature is the positive, the
  queue holds the negatives. With statistics by groups of a batch, a query and its key must not be normalized
  in the same company: the momentum encoder sees the batch in another order.

  Args:
    momentum: see `momentum_encoder`.
    size: of the queue.
    features: dimension of the projections.
    temperature: of the cross-entropy.
  """

  def init(variables: Variables, key: Array) -> PyTree:
    queue, pointer = losses.queue_init(key, features, size)
    return {'target': variables, 'queue': queue, 'queue_pointer': pointer}

  def see(encoder: nn.Module, extra: PyTree, views: Views, key: Array) -> Seen:
    order = jax.random.permutation(key, len(views[1]))
    (z,), new = target_pass(encoder, extra, [views[1][order]])
    keys, queue = losses.normalize(z)[jnp.argsort(order)], extra['queue']
    new['queue'], new['queue_pointer'] = losses.queue_push(queue, extra['queue_pointer'], keys)

    def loss(predictions: list[Array], targets: list[Array]) -> Array:
      query = losses.normalize(predictions[0])
      return losses.info_nce_queue(query, targets[0], queue, temperature)[0]

    return Seen(views[:1], [keys], loss, new)

  return Targets(init, see, follow(momentum))


def target_pass(encoder: nn.Module, extra: PyTree, views: Views) -> tuple[list[Array], PyTree]:
  """Returns the momentum encoder's features of the views, and `extra` behind the pass."""
  z, changed = models.apply_in_turn(encoder, extra['target'], views)
  target = {**extra['target'], **changed}
  return jax.lax.stop_gradient(wide(z)), {**extra, 'target': target}


def follow(momentum: float) -> Callable[[TrainState], TrainState]:
  """Returns the step of a momentum encoder, `extra['target']`, to the parameters of the encoder."""

  def after(state: TrainState) -> TrainState:
    target = state.extra['target']
    moved = optax.incremental_update(state.params['encoder'], target['params'], 1 - momentum)
    return state.replace(extra={**state.extra, 'target': {**target, 'params': moved}})

  return after


def wide(features: list[Array]) -> list[Array]:
  """Returns features in at least float32, in which losses are computed."""
  return [z.astype(jnp.promote_types(z.dtype, jnp.float32)) for z in features]


def baseline(
  name: str, model: Mapping[str, Any], heads: Heads, momentum: Momentum
) -> tuple[Networks, Targets]:
  """Returns encoder and predictor of a method of `BASELINES`, and its targets.

  Args:
    name: a key of `BASELINES`.
    model: name and fields of the backbone; heads share its `norm_groups`.
    heads: sizes.
    momentum: of the methods that have it.
  """
  backbone, groups = networks.create(model, num_classes=None), model.get('norm_groups', 1)
  sizes, own = (heads.hidden, heads.features), momentum
  if name == 'moco':
    encoder = models.Encoder(backbone, models.moco_projector(*sizes))
    queue = own.queue_size, heads.features, own.temperature
    return Networks(encoder, None), momentum_queue(own.momentum, *queue)
  projector = models.simsiam_projector(*sizes, norm_groups=groups)
  predictor = models.simsiam_predictor(heads.predictor, heads.features, norm_groups=groups)
  nets = Networks(models.Encoder(backbone, projector), predictor)
  return nets, momentum_encoder(own.momentum) if name == 'byol' else own_projections()
