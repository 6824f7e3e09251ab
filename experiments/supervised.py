"""Supervised training in stages: each a pure function of the configuration.

`config.stages[name]` says what a stage trains, from what, on which records, and with which loss:

- `loss`: name and options, see `stage_loss.make_loss`; `mixup`: its alpha, 0 for none;
- `epochs`, `batch_size`, `optimizer`, `schedule` (a schedule with `staircase=True` changes per epoch alone);
- `head`: 'linear', 'scaled' (learnable weight scaling) or 'cosine';
- `start`: the stage whose variables it takes over, all but those that match `fresh`; `pretrained`: the name
  of public weights for the backbone instead; `teacher`: the stage whose predictions it learns from;
- `frozen`: patterns of parameters that stay; `eval_mode`: patterns of modules whose batch norms use and keep
  their running statistics. A frozen backbone outside of `eval_mode` goes on adapting them;
- `sampler`: None (every record once an epoch), 'class_balanced', 'class_aware' or 'square_root';
- `cap`: of the stage `merged.of`, which is trained on subsets of at most so many records a class; `holdout`:
  leave out this share of each class.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict, FrozenConfigDict

from experiments.stage_loss import make_loss
from jaxlab import data, models
from jaxlab.data.long_tail import exponential_counts, step_counts
from jaxlab.data.mixing import mixup, mixup_loss
from jaxlab.models.classifier_heads import Classifier, LearnableWeightScaling, NormedLinear
from jaxlab.models.initializers import (
  Initializer,
  kaiming_normal_fan_in,
  torch_default,
  torch_default_bias,
)
from jaxlab.training import Program, TrainState, make_optimizer, make_schedule
from jaxlab.training.schedules import per_epoch

Array = jax.Array
PyTree = Any

HEADS = ('linear', 'scaled', 'cosine')
SAMPLERS = (None, 'class_balanced', 'class_aware', 'square_root')


def get_stage(config: ConfigDict, name: str) -> ConfigDict:
  """Returns `config.stages[name]`.

  Raises:
    ValueError: if there is no such stage, its head or sampler does not exist, or it has a `cap` without being
      the stage that is trained on subsets.
  """
  if name not in config.stages:
    raise ValueError(f'there is no stages.{name}; stages: {", ".join(config.stages)}.')
  stage = config.stages[name]
  for field, known in (('head', HEADS), ('sampler', SAMPLERS)):
    if stage[field] not in known:
      raise ValueError(f'stages.{name}.{field}={stage[field]!r}: expected one of {known}.')
  subsets_of = config.merged.of if 'merged' in config else None
  if stage.cap is not None and (stage.cap < 1 or name != subsets_of):
    raise ValueError(
      f'stages.{name}.cap={stage.cap}: expected a number >= 1 for merged.of ({subsets_of!r}), none otherwise.'
    )
  return stage


def nominal_counts(config: ConfigDict) -> np.ndarray:
  """Returns the training images of each class that the configuration promises, int64 `[num_classes]`.

  Exact where they follow from it (`data.long_tail.kind` 'split', 'exponential', 'step'). For a published
  list (`'listed'`) the exponential profile from `max_count` down to `max_count / ratio`: enough to build and
  compile the program; training takes the list's own.
  """
  tail = config.data.long_tail
  make = step_counts if tail.kind == 'step' else exponential_counts
  return make(config.data.num_classes, tail.max_count, tail.ratio)


def held_out(counts: np.ndarray, share: float) -> np.ndarray:
  """Returns how many records of each class a hold-out takes: the rounded share, at least one.

  Raises:
    ValueError: if nothing would be left of a class.
  """
  if not share:
    return np.zeros_like(counts)
  taken = np.maximum(np.round(share * counts).astype(counts.dtype), 1)
  if np.any(taken >= counts):
    worst = int(np.argmin(counts - taken))
    raise ValueError(
      f'holdout={share} leaves nothing of class {worst}, which has {counts[worst]} training images; '
      'leave stages with a hold-out out (GML: --config.tau.holdout= for no tau-norm).'
    )
  return taken


def epoch_size(config: ConfigDict, stage: ConfigDict, counts: np.ndarray | None = None) -> int:
  """Returns how many records an epoch of a stage draws.

  All that it trains on; with the class-aware sampler so many that `ceil(N / batch) + 1` batches come out, as
  in the code of MiSLAS and BTM.
  """
  given = nominal_counts(config) if counts is None else counts
  own = given - held_out(given, stage.holdout)
  own = np.minimum(own, stage.cap or own)
  size = int(own.sum())
  if counts is None and config.data.long_tail.kind == 'listed' and not stage.cap:
    size = int(config.data.train_size * (1 - stage.holdout))
  if stage.sampler == 'class_aware':
    size = (math.ceil(size / stage.batch_size) + 1) * stage.batch_size
  if size < stage.batch_size:
    raise ValueError(
      f'stage {stage.title!r}: batch_size={stage.batch_size} exceeds its {size} training records.'
    )
  return size


def num_steps(config: ConfigDict, stage: ConfigDict, counts: np.ndarray | None = None) -> int:
  """Returns the optimizer steps of a stage."""
  return stage.epochs * (epoch_size(config, stage, counts) // stage.batch_size)


def classifier(config: ConfigDict, stage: ConfigDict) -> Classifier:
  """Returns the network of a stage: `config.model.backbone` under the stage's head."""
  fields = {k: v for k, v in config.model.backbone.items() if k != 'name'}
  backbone = models.create(config.model.backbone.name, num_classes=None, **fields)
  classes = config.data.num_classes
  if stage.head == 'scaled':
    return Classifier(backbone, LearnableWeightScaling(classes))
  if stage.head == 'cosine':
    return Classifier(backbone, NormedLinear(classes))
  kernel_init = kaiming_normal_fan_in if config.model.head_init == 'kaiming' else torch_default
  return Classifier(backbone, Linear(classes, kernel_init))


class Linear(nn.Module):
  """`x @ kernel + bias`, the bias drawn as PyTorch's; `LearnableWeightScaling` has the same parameters.

  Attributes:
    num_classes: number of logits.
    kernel_init: initializer of the kernel.
  """

  num_classes: int
  kernel_init: Initializer = torch_default

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[..., features]` to logits `[..., num_classes]`."""
    kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.num_classes))
    bias = self.param('bias', torch_default_bias(x.shape[-1]), (self.num_classes,))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
    return x @ kernel + bias


def inputs(section: ConfigDict | FrozenConfigDict, images: Array) -> Array:
  """Returns the network's input of stored images that have its size; `section` is `config.data`."""
  return data.normalize(data.to_float(images), section.mean, section.std)


def augmented(config: ConfigDict, keys: Array, images: Array) -> Array:
  """Returns the network's input under the training augmentation `config.augment`.

  `kind` 'none', 'pad_crop' (zeros around, a random part of the stored size, a random flip: He et al. 2016) or
  'resized_crop' (the options of `data.siamese_augment`).
  """
  options = config.augment.to_dict()
  kind = options.pop('kind')
  if kind == 'none':
    return inputs(config.data, images)
  if kind == 'resized_crop':
    augment = data.siamese_augment(
      config.data.image_size, **options, mean=config.data.mean, std=config.data.std
    )
    return data.draw_views(augment, keys, images, 1)[0]
  if kind != 'pad_crop':
    raise ValueError(f"augment.kind={kind!r}: expected 'none', 'pad_crop' or 'resized_crop'.")
  steps = [functools.partial(data.random_crop, padding=options['padding'])]
  if options['flip']:
    steps.append(data.random_flip)
  return inputs(config.data, jax.vmap(data.compose(*steps))(keys, data.to_float(images)))


def program(config: ConfigDict, stage: str, counts: np.ndarray | None = None) -> Program:
  """Returns the training of a stage as pure functions of the configuration.

  A teacher's variables lie in `state.extra['teacher']`; it sees the very batch of the student, augmented and
  mixed, in eval mode and without gradient. `init` draws all variables anew: `take_over` puts those of another
  stage in.

  Args:
    config: with `stages`, `model`, `data`, `augment`.
    stage: name of one of `config.stages`.
    counts: training images of each class; default: `nominal_counts`.

  Raises:
    ValueError: for settings that do not exist or do not fit together.
  """
  own = get_stage(config, stage)
  per = epoch_size(config, own, counts) // own.batch_size
  counts = nominal_counts(config) if counts is None else counts
  model = classifier(config, own)
  teacher = classifier(config, get_stage(config, own.teacher)) if own.teacher else None
  loss_of = make_loss(own, counts - held_out(counts, own.holdout), per)
  schedule = stage_schedule(own, per)
  optimizer = make_optimizer(learning_rate=schedule, frozen=own.frozen, **own.optimizer)
  hooks = eval_mode_hooks(own.eval_mode)

  def init(key: Array) -> TrainState:
    init_key, teacher_key, step_key = jax.random.split(key, 3)
    variables = dict(model.init(init_key, _blank(config)))
    params = variables.pop('params')
    extra = {'key': jax.random.key_data(step_key)}
    if teacher is not None:
      extra['teacher'] = dict(teacher.init(teacher_key, _blank(config)))
    return TrainState(jnp.int32(0), params, optimizer.init(params), variables, extra)

  def step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
    augment_key, mixup_key = jax.random.split(jax.random.wrap_key_data(state.extra['key']))
    # A sampler may draw a record twice into a batch: its copies are told apart by their place in it.
    index = batch['index'] if own.sampler is None else jnp.arange(own.batch_size)
    keys = data.example_keys(augment_key, state.step, index)
    x, y = augmented(config, keys, batch['image']), batch['label']
    mixup_key = jax.random.fold_in(mixup_key, state.step)
    x, partner, lam = mixup(mixup_key, x, own.mixup)
    told = None if teacher is None else teacher.apply(state.extra['teacher'], x)

    def objective(params):
      logits, changed = models.apply(
        model,
        {'params': params, **state.model_state},
        x,
        train=True,
        mutable=list(state.model_state),
        hooks=hooks,
      )
      logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
      if own.mixup > 0:
        value = mixup_loss(
          lambda z, labels: loss_of(z, labels, told, state.step), logits, y, partner, lam
        )
      else:
        value = loss_of(logits, y, told, state.step)
      return value, (dict(changed), jnp.mean(jnp.argmax(logits, -1) == y))

    (value, (changed, accuracy)), gradient = jax.value_and_grad(objective, has_aux=True)(
      state.params
    )
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    new = TrainState(
      state.step + 1, optax.apply_updates(state.params, updates), opt_state, changed, state.extra
    )
    return new, {'loss': value, 'accuracy': accuracy, 'learning_rate': schedule(state.step)}

  size = (own.batch_size,)
  batch = {
    'image': jax.ShapeDtypeStruct((*size, *config.data.stored_image), jnp.dtype(config.data.dtype)),
    'label': jax.ShapeDtypeStruct(size, jnp.int32),
    'index': jax.ShapeDtypeStruct(size, jnp.int32),
  }
  return Program(init, step, batch)


def stage_schedule(stage: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
  """Returns the learning rate of a stage over steps; with `staircase` it changes between epochs alone."""
  options = stage.schedule.to_dict()
  if options.pop('staircase', False):
    epochs = make_schedule(**options, epochs=stage.epochs, steps_per_epoch=1)
    return per_epoch(epochs, steps_per_epoch)
  return make_schedule(**options, epochs=stage.epochs, steps_per_epoch=steps_per_epoch)


def replicate(single: Program, count: int) -> Program:
  """Returns `count` independent runs of a program as one, mapped over a leading axis of the state.

  Run k starts from `run_key(key, k)`. Images and labels of a batch have the runs on their second axis,
  `index` belongs to all; metrics are means. One after the other with the same keys and batches, the runs end
  with the same parameters up to rounding.
  """

  def init(key: Array) -> TrainState:
    return jax.vmap(lambda k: single.init(run_key(key, k)))(jnp.arange(count))

  axes = {name: None if name == 'index' else 1 for name in single.batch}

  def step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
    new, metrics = jax.vmap(single.step, in_axes=(0, axes))(state, batch)
    return new, {name: jnp.mean(values) for name, values in metrics.items()}

  batch = {
    name: leaf
    if axes[name] is None
    else jax.ShapeDtypeStruct((leaf.shape[0], count, *leaf.shape[1:]), leaf.dtype)
    for name, leaf in single.batch.items()
  }
  return Program(init, step, batch)


def run_key(key: Array, run: Array | int) -> Array:
  """Returns the key that the `run`-th of several runs of a program starts from."""
  return jax.random.fold_in(key, run)


def take_over(
  state: TrainState,
  start: Mapping[str, PyTree] | None,
  *,
  fresh: tuple[str, ...] = (),
  teacher: Mapping[str, PyTree] | None = None,
) -> TrainState:
  """Returns an initial state with the variables of another stage, and with a teacher's.

  Args:
    state: from `Program.init`.
    start: `{'params', ...}`; None leaves all as drawn.
    fresh: patterns of paths (`head/scale`) that stay as drawn. Every other variable must be in `start`.
    teacher: variables for `extra['teacher']`.

  Raises:
    ValueError: for variables that `start` lacks or holds in another shape; all are listed.
  """
  if teacher is not None:
    state = state.replace(
      extra={**state.extra, 'teacher': _matched(state.extra['teacher'], teacher)}
    )
  if start is None:
    return state
  new = _matched({'params': state.params, **state.model_state}, start, tuple(fresh))
  params = new.pop('params')
  return state.replace(params=params, model_state=new)


def _matched(own: PyTree, given: Mapping[str, PyTree], fresh: tuple[str, ...] = ()) -> PyTree:
  flat = traverse_util.flatten_dict(dict(own))
  source = traverse_util.flatten_dict(dict(given))
  wrong, taken = [], {}
  for path, leaf in flat.items():
    name = '/'.join(path[1:])
    if any(re.fullmatch(pattern, name) for pattern in fresh):
      taken[path] = leaf
    elif path not in source or source[path].shape != leaf.shape:
      held = source[path].shape if path in source else 'nothing'
      wrong.append(f'{"/".join(path)}: {leaf.shape} wanted, {held} given')
    else:
      taken[path] = source[path]
  if wrong:
    raise ValueError(
      'the variables to start from are of another architecture:\n  ' + '\n  '.join(wrong[:10])
    )
  return traverse_util.unflatten_dict(taken)


def eval_mode_hooks(patterns: Sequence[str]) -> tuple[models.Hook, ...]:
  """Returns the hooks that call the modules `(x, train)` whose paths match with `train=False`."""
  return tuple(models.Hook(pattern, call=_in_eval_mode) for pattern in patterns)


def _in_eval_mode(site: models.Site, call: Callable[..., Any], *args: Any, **_: Any) -> Any:
  """Calls a module `(x, train)` with `train=False`."""
  del site
  return call(args[0], False)


def _blank(config: ConfigDict) -> Array:
  side, channels = config.data.image_size, config.data.channels
  height, width = (side, side) if isinstance(side, int) else side
  return jnp.zeros((2, height, width, channels))
