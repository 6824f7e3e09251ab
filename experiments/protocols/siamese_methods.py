"""Self-supervised methods as networks and targets of `siamese`: what others build on and are compared with.

SimCLR, MoCo v2 (both Chen et al. 2020), BYOL (Grill et al. 2020), SimSiam (Chen & He 2021), DINO (Caron et
al. 2021), Barlow Twins (Zbontar et al. 2021).
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from experiments.harness import networks
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Optimizer, Recipe
from experiments.protocols import pretraining, siamese
from experiments.protocols.pretraining import Length
from experiments.protocols.siamese import Networks, Seen, Targets, Views, follow, target_pass
from jaxlab import losses, models
from jaxlab.parallel import deinterleave, interleave, over_batch
from jaxlab.training import by_path, held, schedules

Array = jax.Array
PyTree = Any
Loss = Callable[[list[Array], list[Array]], Array]

TITLES = {
  'simclr': 'SimCLR',
  'moco': 'MoCo v2',
  'byol': 'BYOL',
  'simsiam': 'SimSiam',
  'dino': 'DINO',
  'barlow': 'Barlow Twins',
}
FROZEN_BIAS = 'encoder/projector/fc2/bias'  # of SimSiam's projector, which its norm cancels
LAST_LAYER = tuple(f'encoder/projector/last_layer_{name}' for name in ('kernel', 'scale'))  # DINO's


@dataclasses.dataclass(frozen=True)
class Heads:
  """Sizes: of the projector inside and at its end, and of the predictor inside where there is one.

  Attributes:
    hidden: channels of the projector's hidden layers.
    features: channels of its last one.
    predictor: channels inside of the predictor.
    style: 'own': the layers that each method has in its paper; 'mlp': for all but DINO two layers with a
      batch norm and a ReLU between, predictors too.
  """

  hidden: int = 2048
  features: int = 2048
  predictor: int = 512
  style: Literal['own', 'mlp'] = 'own'


@dataclasses.dataclass(frozen=True)
class Momentum:
  """A momentum encoder, and the queue of its features where the method has one.

  Attributes:
    momentum: share of the momentum encoder that a step keeps.
    final: the share at the end of the training, half a cosine from `momentum`; None: constant.
    queue_size: past features (MoCo).
    temperature: of the cross-entropy over them, and over the batch (SimCLR).
  """

  momentum: float = 0.99
  final: float | None = None
  queue_size: int = 4096
  temperature: float = 0.2

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    for name in ('momentum', 'final'):
      share = getattr(self, name)
      if share is not None and not 0 <= share <= 1:
        yield f'{name}={share}: expected a share in [0, 1].'
    if self.queue_size < 1 or self.temperature <= 0:
      yield f'queue_size={self.queue_size}, temperature={self.temperature}: expected positive numbers.'

  def schedule(self, num_steps: int) -> float | optax.Schedule:
    """Returns the share over a training's steps."""
    if self.final is None:
      return self.momentum
    return schedules.cosine(self.momentum, num_steps, self.final)


@dataclasses.dataclass(frozen=True)
class Prototypes:
  """DINO's classifier of prototypes, and what keeps it from collapsing.

  Attributes:
    count: prototypes.
    bottleneck: channels in front of them.
    student_temperature: of the student's softmax.
    teacher_temperature: of the teacher's, from the end of its warm-up on.
    warmup_temperature: at the beginning.
    warmup_epochs: of the teacher's temperature, linear, both ends included.
    center_momentum: share of the teacher's mean that a step keeps.
    norm_last_layer: keeps the length of the prototypes at 1.
    held_epochs: in which the prototypes stay as drawn.
  """

  count: int = 65536
  bottleneck: int = 256
  student_temperature: float = 0.1
  teacher_temperature: float = 0.04
  warmup_temperature: float = 0.04
  warmup_epochs: int = 0
  center_momentum: float = 0.9
  norm_last_layer: bool = True
  held_epochs: int = 1

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    for name in (
      'count',
      'bottleneck',
      'student_temperature',
      'teacher_temperature',
      'warmup_temperature',
    ):
      if getattr(self, name) <= 0:
        yield f'{name}={getattr(self, name)}: expected a positive number.'
    for name in ('warmup_epochs', 'held_epochs'):
      if getattr(self, name) < 0:
        yield f'{name}={getattr(self, name)}: expected at least 0.'
    if not 0 <= self.center_momentum <= 1:
      yield f'center_momentum={self.center_momentum}: expected a share in [0, 1].'


def siamese_loss(predictions: list[Array], targets: list[Array]) -> Array:
  """Returns `(D(p1, z2) + D(p2, z1)) / 2` with `D` the mean negative cosine; targets get no gradient."""
  return losses.simsiam_loss(*predictions, *targets)


def own_projections(loss: Loss = siamese_loss) -> Targets:
  """Returns the targets of a single network: its projections of the views.

  Args:
    loss: `(predictions, projections) -> scalar`; SimSiam's by default, which gives targets no gradient.
  """
  return Targets(
    lambda variables, key: {},
    lambda encoder, extra, views, key, step: Seen(views, None, loss, extra),
  )


def byol_loss(predictions: list[Array], targets: list[Array]) -> Array:
  """Returns the mean of `|p1 - z2|^2 + |p2 - z1|^2`, of vectors of length 1; targets get no gradient."""
  return losses.byol_loss(*predictions, *targets)


def momentum_encoder(momentum: float | optax.Schedule, loss: Loss = byol_loss) -> Targets:
  """Returns the targets of an encoder that follows the online one.

  `target <- momentum * target + (1 - momentum) * online` over parameters alone, behind every step; its
  running statistics are its own, from its passes in train mode.

  Args:
    momentum: see `siamese.follow`.
    loss: `(predictions, targets) -> scalar`.
  """

  def see(encoder: nn.Module, extra: PyTree, views: Views, key: Array, step: Array) -> Seen:
    del key, step
    targets, extra = target_pass(encoder, extra, views)
    return Seen(views, targets, loss, extra)

  return Targets(lambda variables, key: {'target': variables}, see, follow(momentum))


def momentum_queue(
  momentum: float | optax.Schedule,
  size: int,
  features: int,
  temperature: float,
  channels: int | None = None,
  *,
  groups: int = 1,
) -> Targets:
  """Returns the targets of a momentum encoder next to a queue of its past features.

  The online network sees the first view, the momentum encoder the second: its feature is the positive, the
  queue holds the negatives. With statistics by groups of a batch, a query and its key must not be normalized
  in the same company: the momentum encoder sees the batch in another order. Statistics of the whole batch do
  not depend on its order: with one group nothing is moved, which on many devices costs a gathering of images.

  Args:
    momentum: see `momentum_encoder`.
    size: of the queue.
    features: dimension of the projections.
    temperature: of the cross-entropy.
    channels: of the backbone's features, where another queue, `extra['feature_queue']`, holds them in the
      order of the projections; the encoder returns both (`with_features`). None: no such queue.
    groups: of the batch with statistics of their own.
  """
  names = ('queue',) if channels is None else ('feature_queue', 'queue')

  def init(variables: Variables, key: Array) -> PyTree:
    queue, pointer = losses.queue_init(key, features, size)
    extra = {'target': variables, 'queue': queue, 'queue_pointer': pointer}
    if channels is not None:
      extra['feature_queue'], _ = losses.queue_init(jax.random.fold_in(key, 1), channels, size)
    return extra

  def see(encoder: nn.Module, extra: PyTree, views: Views, key: Array, step: Array) -> Seen:
    del step
    images, order = views[1], jax.random.permutation(key, len(views[1]))
    if groups > 1:
      images = over_batch(images[order])
    (z,), new = target_pass(encoder, extra, [images])
    found, old = (z,) if channels is None else z, [extra[name] for name in names]
    keys = [losses.normalize(vectors) for vectors in found]
    if groups > 1:
      keys = [over_batch(vectors[jnp.argsort(order)]) for vectors in keys]
    pushed, new['queue_pointer'] = losses.queues_push(old, extra['queue_pointer'], keys)
    new |= dict(zip(names, pushed, strict=True))

    def loss(predictions: list[Array], targets: list[Array]) -> Array:
      query = losses.normalize(predictions[0])
      return losses.info_nce_queue(query, targets[0], old[-1], temperature)[0]

    return Seen(views[:1], keys[-1:], loss, new)

  return Targets(init, see, follow(momentum))


def prototypes(own: Prototypes, momentum: float | optax.Schedule, steps_per_epoch: int) -> Targets:
  """Returns DINO's targets: what a momentum encoder says of the first two views, centered and sharpened.

  Neighboring views of one size go through the encoder as one batch, as in the official code, here image by
  image: so no view leaves its device.

  Args:
    own: temperatures and center.
    momentum: of the encoder.
    steps_per_epoch: of the teacher's temperature.
  """

  def init(variables: Variables, key: Array) -> PyTree:
    del key
    return {'target': variables, 'center': jnp.zeros(own.count)}

  def see(encoder: nn.Module, extra: PyTree, views: Views, key: Array, step: Array) -> Seen:
    del key
    targets, new = target_pass(encoder, extra, [interleave(views[:2])])
    new['center'] = losses.dino_center_update(extra['center'], targets[0], own.center_momentum)
    temperature = losses.dino_teacher_temperature(
      step // steps_per_epoch, own.warmup_temperature, own.teacher_temperature, own.warmup_epochs
    )

    sizes = [list(same) for _, same in itertools.groupby(views, lambda view: view.shape)]

    def loss(predictions: list[Array], targets: list[Array]) -> Array:
      each = [deinterleave(z, len(same)) for z, same in zip(predictions, sizes, strict=True)]
      return losses.dino_loss(
        jnp.concatenate(each), deinterleave(targets[0], 2), extra['center'], len(views),
        temperature, own.student_temperature,
      )  # fmt: skip

    return Seen([interleave(same) for same in sizes], targets, loss, new)

  return Targets(init, see, follow(momentum))


def predicted(model: Mapping[str, Any], heads: Heads) -> Networks:
  """Returns SimSiam's encoder and predictor over a backbone; heads share its `norm_groups`."""
  backbone, norm = (
    networks.create(model, num_classes=None),
    {'norm_groups': model.get('norm_groups', 1)},
  )
  projector = models.simsiam_projector(heads.hidden, heads.features, **norm)
  predictor = models.simsiam_predictor(heads.predictor, heads.features, **norm)
  return Networks(models.Encoder(backbone, projector), predictor)


def method(
  name: str,
  model: Mapping[str, Any],
  heads: Heads,
  momentum: Momentum,
  length: Length,
  *,
  prototype: Prototypes = Prototypes(),
  redundancy_weight: float = 0.0051,
) -> tuple[Networks, Targets]:
  """Returns encoder and predictor of a method of `TITLES`, and its targets.

  Args:
    name: a key of `TITLES`.
    model: name and fields of the backbone; heads share its `norm_groups`.
    heads: sizes.
    momentum: of the methods that have it, and temperatures.
    length: of the training.
    prototype: of DINO.
    redundancy_weight: of Barlow Twins.
  """
  sizes, norm = (heads.hidden, heads.features), {'norm_groups': model.get('norm_groups', 1)}
  share = momentum.schedule(length.num_steps)
  mlp = functools.partial(models.byol_mlp, **norm)
  own = {  # layers of projectors that are no `mlp`
    'moco': functools.partial(models.moco_projector, *sizes),
    'barlow': functools.partial(models.barlow_projector, *sizes, **norm),
    'dino': functools.partial(
      models.DINOHead,
      prototype.count,
      heads.hidden,
      prototype.bottleneck,
      prototype.norm_last_layer,
    ),
  }
  if name == 'simclr':
    targets = own_projections(lambda z, _: losses.nt_xent(*z, momentum.temperature))
  elif name == 'moco':
    queue = momentum.queue_size, heads.features, momentum.temperature
    targets = momentum_queue(share, *queue, groups=norm['norm_groups'])
  elif name == 'byol':
    targets = momentum_encoder(share)
  elif name == 'simsiam':
    targets = own_projections()
    if heads.style == 'own':
      return predicted(model, heads), targets
  elif name == 'barlow':
    targets = own_projections(lambda z, _: losses.barlow_twins_loss(*z, redundancy_weight))
  else:
    targets = prototypes(prototype, share, length.steps_per_epoch)
  plain = name not in own or (heads.style == 'mlp' and name != 'dino')
  projector = mlp(*sizes) if plain else own[name]()
  predictor = mlp(heads.predictor, heads.features) if name in ('byol', 'simsiam') else None
  backbone = networks.create(model, num_classes=None)
  return Networks(models.Encoder(backbone, projector), predictor), targets


def check(
  names: Sequence[str], recipe: Recipe, momentum: Momentum, prototype: Prototypes = Prototypes()
) -> Iterator[str]:
  """Yields what methods cannot be trained with: queues that do not divide, norms over what is held."""
  queue, batch = momentum.queue_size, recipe.batch_size
  if 'moco' in names and queue % batch:
    yield f'target.queue_size={queue}: expected a multiple of recipe.batch_size={batch}.'
  if 'dino' in names and recipe.optimizer.clip_global_norm and prototype.held_epochs:
    yield 'recipe.optimizer.clip_global_norm: DINO holds its last layer; clip each tensor (clip_per_tensor).'


def training(
  config: pretraining.Settings,
  name: str,
  heads: Heads,
  momentum: Momentum,
  *,
  prototype: Prototypes = Prototypes(),
  predictor_rate: float | None = None,
) -> Run:
  """Returns the pretraining by a method of `TITLES`, on two views drawn alike.

  The metric `z_std` is the spread of the first view's projections.

  Args:
    config: the settings.
    name: of the method.
    heads: over the backbone.
    momentum: of the methods that have it, and temperatures.
    prototype: of DINO.
    predictor_rate: of SimSiam, see `optimizer`.
  """
  own = config.model, heads, momentum, pretraining.length(config)
  nets, targets = method(name, *own, prototype=prototype)
  images = jnp.zeros((2 * config.model.get('norm_groups', 1), *config.data.view))
  drawn = ('drop_path',) * bool(config.model.get('drop_path'))

  made = optimizer(
    name, config.recipe.optimizer, heads, pretraining.length(config), prototype=prototype,
    predictor_rate=predictor_rate,
  )  # fmt: skip
  decides = {'method': name, 'heads': heads, 'target': momentum}
  decides |= {} if predictor_rate is None else {'predictor_rate': predictor_rate}
  decides |= {'prototypes': prototype} if name == 'dino' else {}
  return pretraining.training(
    config, TITLES[name], siamese.init(nets, targets, images, drawn),
    siamese.view_loss(nets, targets, drawn), after=targets.after, optimizer=made, decides=decides,
  )  # fmt: skip


def optimizer(
  name: str,
  own: Optimizer,
  heads: Heads,
  length: Length,
  *,
  prototype: Prototypes = Prototypes(),
  final_weight_decay: float | None = None,
  predictor_rate: float | None = None,
  frozen: Sequence[str] = (),
) -> Callable[[optax.Schedule], optax.GradientTransformation]:
  """Returns `schedule -> optimizer` of a method: what stays, what is held, what has a rate of its own.

  Args:
    name: of the method.
    own: the optimizer's section.
    heads: as for `method`, as `prototype`.
    length: of the training.
    prototype: DINO's last layer is held for the first epochs.
    final_weight_decay: at the end, half a cosine from the section's; None: constant.
    predictor_rate: SimSiam's predictor has this learning rate, constant; None: that of all.
    frozen: further patterns of parameters that stay.
  """
  options: dict[str, Any] = {}
  if final_weight_decay is not None:
    start = own.weight_decay
    options['weight_decay'] = schedules.cosine(start, length.num_steps, final_weight_decay)
  if name == 'simsiam' and predictor_rate is not None:
    options['lr_overrides'] = [('predictor/.*', predictor_rate)]
  if name == 'simsiam' and heads.style == 'own':
    frozen = (*frozen, FROZEN_BIAS)
  held_steps = prototype.held_epochs * length.steps_per_epoch if name == 'dino' else 0

  def make(schedule: optax.Schedule) -> optax.GradientTransformation:
    if not held_steps:
      return own.make(schedule, frozen, **options)
    layers = LAST_LAYER[: 1 if prototype.norm_last_layer else 2]
    whole = own.make(schedule, frozen, elsewhere=layers, **options)
    # Its group has the patterns that name it, and schedules that are as far as those of the others.
    named = [*layers, *['ndim<=1'] * (len(layers) > 1)]
    last = dataclasses.replace(
      own,
      no_decay=tuple(p for p in own.no_decay or () if _matches_any(p, named)) or None,
      lr_multipliers=tuple(p for p in own.lr_multipliers if _matches_any(p[0], named)),
    )
    ahead = {key: _ahead(value, held_steps) for key, value in options.items()}
    late = held(last.make(_ahead(schedule, held_steps), **ahead), held_steps)
    return by_path([('|'.join(layers), late), ('.*', whole)])

  return make


def _matches_any(pattern: str, names: Sequence[str]) -> bool:
  return any(pattern == name or re.fullmatch(pattern, name) for name in names)


def _ahead(value: Any, steps: int) -> Any:
  """Returns a schedule that is `steps` ahead; what is none as it is."""
  return (lambda count: value(count + steps)) if callable(value) else value
