"""The frame of siamese methods: an encoder, perhaps a predictor behind it, and where its targets come from.

The methods themselves are in `siamese_methods`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from experiments.harness.runs import Variables
from jaxlab import evaluation, models
from jaxlab.training import Initial, LossState, Out, TrainState, cast_floating

Array = jax.Array
PyTree = Any
Views = list[Array]


class Networks(NamedTuple):
  """The trained modules: an encoder, and a predictor where the method has one."""

  encoder: nn.Module
  predictor: nn.Module | None


def backbone_variables(variables: Variables) -> Variables:
  """Returns the backbone's own variables out of those of siamese networks."""
  return {
    kind: variables[kind]['encoder']['backbone']
    for kind in ('params', 'batch_stats')
    if 'backbone' in variables.get(kind, {}).get('encoder', {})
  }


class Online(NamedTuple):
  """What a pass of the online network over the views gives.

  Attributes:
    projections: of each view, in at least float32; pairs of an encoder that returns its features, too.
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
  rngs: dict[str, Array] | None = None,
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
    rngs: keys by stream of what the encoder draws.
  """
  stats = batch_stats['encoder']
  variables = {'params': params['encoder'], 'batch_stats': stats, **(given or {})}
  mutable = ('batch_stats', *mutable)
  z, left = models.apply_in_turn(
    nets.encoder, variables, views, mutable=mutable, hooks=hooks, rngs=rngs
  )
  new, p = {'encoder': left.pop('batch_stats', {})}, z
  if nets.predictor is not None:
    variables = {'params': params['predictor'], 'batch_stats': batch_stats['predictor']}
    p, changed = models.apply_in_turn(nets.predictor, variables, z)
    new['predictor'] = changed.get('batch_stats', {})
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
    see: `(encoder, extra, views, key, step) -> Seen`.
    after: moves the momentum encoder behind every step; None: there is none.
  """

  init: Callable[[Variables, Array], PyTree]
  see: Callable[[nn.Module, PyTree, Views, Array, Array], Seen]
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
    drawing = {'params': encoder_key, **dict.fromkeys(streams, encoder_key)}
    z, encoder = nets.encoder.init_with_output(drawing, images, train=True)
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


def view_loss(
  nets: Networks, targets: Targets, drawn: Sequence[str] = ()
) -> Callable[[PyTree, LossState, Views, dict[str, Array]], tuple[Array, Out]]:
  """Returns the loss of a method over its views, for `pretraining.training`.

  Its metric `z_std` is the spread of the first view's projections; of those of a method with a center, which
  have a mean of their own, around that.

  Args:
    nets: the modules.
    targets: of the method.
    drawn: names of the streams that the encoder draws from in training.
  """

  def loss(
    params: PyTree, state: LossState, views: Views, keys: dict[str, Array]
  ) -> tuple[Array, Out]:
    seen = targets.see(nets.encoder, state.extra, views, keys['order'], state.step)
    stats, rngs = state.model_state['batch_stats'], {name: keys[name] for name in drawn}
    online = online_pass(nets, params, stats, seen.views, rngs=rngs)
    given = online.projections if seen.targets is None else seen.targets
    z = online.projections[0] - state.extra.get('center', 0)
    z_std = evaluation.feature_std(jax.lax.stop_gradient(z))
    out = Out({'batch_stats': online.batch_stats}, seen.extra, {'z_std': z_std})
    return seen.loss(online.predictions, given), out

  return loss


def target_pass(encoder: nn.Module, extra: PyTree, views: Views) -> tuple[list[Array], PyTree]:
  """Returns the momentum encoder's features of the views, and `extra` behind the pass.

  In train mode but without drop path, in the precision of the views.
  """
  if getattr(encoder.backbone, 'drop_path', 0):
    encoder = encoder.clone(backbone=encoder.backbone.clone(drop_path=0.0))
  own = extra['target']
  given = {**own, 'params': cast_floating(own['params'], views[0].dtype)}
  z, changed = models.apply_in_turn(encoder, given, views)
  return jax.lax.stop_gradient(wide(z)), {**extra, 'target': {**own, **changed}}


def follow(momentum: float | optax.Schedule) -> Callable[[TrainState], TrainState]:
  """Returns the step of a momentum encoder, `extra['target']`, to the parameters of the encoder.

  Args:
    momentum: share of the momentum encoder that is kept, or a schedule of it over steps, the first being 0.
  """

  def after(state: TrainState) -> TrainState:
    target, kept = state.extra['target'], momentum
    if callable(momentum):
      kept = momentum(state.step - 1)
    moved = optax.incremental_update(state.params['encoder'], target['params'], 1 - kept)
    return state.replace(extra={**state.extra, 'target': {**target, 'params': moved}})

  return after


def wide(features: PyTree) -> PyTree:
  """Returns features in at least float32, in which losses are computed."""
  return jax.tree.map(lambda z: z.astype(jnp.promote_types(z.dtype, jnp.float32)), features)
