"""SSQL: Synergistic Self-supervised and Quantization Learning (Cao et al., ECCV 2022).

One network is trained to be quantized to any bit-width afterwards. Every step runs the same weights twice:
in float, and fake-quantized to bit-widths drawn for this step. The features of the quantized pass must
predict the float features of the other view. Claim: after plain min-max quantization to few bits such a
network loses much less than SimSiam (BYOL, MoCo v2), trained for as many steps, does.

  python -m experiments.ssql
  python -m experiments.ssql --config=mlcollections_configs/ssql/imagenet_resnet50.py --workdir=DIR
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from experiments import launcher, quantized_features, training
from experiments.results import results, row
from jaxlab import data, evaluation, losses, models, quantizers
from jaxlab.models import Encoder
from jaxlab.quantizers import BitPolicy
from jaxlab.training import Program, TrainState, make_optimizer, make_schedule

Array = jax.Array
PyTree = Any

NAMES = {'simsiam': 'SimSiam', 'byol': 'BYOL', 'moco': 'MoCo v2'}


class Networks(NamedTuple):
  """The trained modules: an encoder, and a predictor where the base method has one."""

  encoder: nn.Module
  predictor: nn.Module | None


class Online(NamedTuple):
  """What a pass of the online network over two views gives."""

  projections: list[Array]
  predictions: list[Array]
  batch_stats: PyTree
  ranges: PyTree


def bit_policy(weight_bits: Any, activation_bits: Any, prefix: str = 'backbone/') -> BitPolicy:
  """Returns SSQL's policy: stem 8/8, projector's weights 8, all else in the backbone as drawn.

  Outputs are quantized after each ReLU: inside a residual branch, and after the sum. The predictor and the
  outputs of the projector stay in float. With `prefix=''` the policy is that of the backbone alone.
  """
  weights = [(f'{prefix}conv1', 8), (f'{prefix}layer.*', weight_bits)]
  if prefix:
    weights.append((r'projector/.*', 8))
  return BitPolicy(
    weights=weights,
    activations=[(f'{prefix}relu', 8), (rf'{prefix}layer.*/relu\d', activation_bits)],
  )


def online_pass(
  nets: Networks,
  params: PyTree,
  batch_stats: PyTree,
  views: list[Array],
  policy: BitPolicy,
  ranges=None,
) -> Online:
  """Runs encoder and predictor over the views: in float, recording ranges, or quantized with given ranges.

  Args:
    nets: the modules.
    params: `{'encoder', 'predictor'}`.
    batch_stats: running statistics, same keys.
    views: arrays `[batch, height, width, channels]`, one forward call each, so that batch statistics are
      per view.
    policy: bit-widths; only its patterns matter to the float pass.
    ranges: None for the float pass; for the quantized pass those of the float pass. Activation scales are
      constants, weight scales pass gradient to each channel's extreme weight.
  """
  variables = {'params': params['encoder'], 'batch_stats': batch_stats['encoder']}
  if ranges is None:
    hooks, mutable = quantizers.range_hooks(policy), ('batch_stats', 'ranges')
  else:
    variables['params'] = quantizers.quantize_weights(params['encoder'], policy, scale_grad=True)
    variables['ranges'] = ranges
    hooks, mutable = quantizers.fake_quantize_hooks(policy), ('batch_stats',)
  z, state = models.apply_in_turn(nets.encoder, variables, views, mutable=mutable, hooks=hooks)
  stats, p = {'encoder': state['batch_stats']}, z
  if nets.predictor is not None:
    variables = {'params': params['predictor'], 'batch_stats': batch_stats['predictor']}
    p, predictor_state = models.apply_in_turn(nets.predictor, variables, z)
    stats['predictor'] = predictor_state['batch_stats']
  return Online(z, p, stats, state.get('ranges'))


def siamese_loss(predictions: list[Array], targets: list[Array]) -> Array:
  """Returns `(D(p1, z2) + D(p2, z1)) / 2` with `D` the mean negative cosine; targets get no gradient."""
  return losses.simsiam_loss(*predictions, *targets)


def objective(
  nets: Networks,
  params: PyTree,
  batch_stats: PyTree,
  views: list[Array],
  bits: tuple[Array, Array],
  *,
  variant: str,
  targets: list[Array] | None = None,
  loss=siamese_loss,
  float_term: bool = False,
) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
  """Returns the loss of one step, the new running statistics, and metrics.

  Args:
    nets: the modules.
    params: `{'encoder', 'predictor'}`.
    batch_stats: same keys.
    views: the augmented views; MoCo's online network sees the first alone.
    bits: weight and activation bit-widths of this step, scalars, traced or not.
    variant: `'base'`: `L(p, z)`. `'ssql'`: `(L(p, z) + L(p_q, z)) / 2`, as the official code
      (the paper sums the two). `'reverse'`: the float network predicts the quantized features, `L(p, z_q)`.
    targets: a momentum network's features of the views; None: the online network's own (SimSiam).
    loss: `(predictions, targets) -> scalar`.
    float_term: in the reverse variant, averages in `L(p, z)` as SSQL does. Whether the authors did is not
      known; without it the variant is what its description says.
  """
  policy = bit_policy(*bits)
  in_float = online_pass(nets, params, batch_stats, views, policy)
  z = in_float.projections if targets is None else targets
  z_std = evaluation.feature_std(jax.lax.stop_gradient(in_float.projections[0]))
  if variant == 'base':
    value = loss(in_float.predictions, z)
    return value, (in_float.batch_stats, {'loss': value, 'z_std': z_std})
  online = params if variant == 'ssql' else jax.lax.stop_gradient(params)
  quantized = online_pass(nets, online, in_float.batch_stats, views, policy, in_float.ranges)
  if variant == 'ssql':
    float_loss, quantized_loss = loss(in_float.predictions, z), loss(quantized.predictions, z)
    value = (float_loss + quantized_loss) / 2
  else:
    float_loss = loss(in_float.predictions, z)
    quantized_loss = loss(in_float.predictions, jax.lax.stop_gradient(quantized.projections))
    value = (float_loss + quantized_loss) / 2 if float_term else quantized_loss
  metrics = {
    'loss': value,
    'loss_float': float_loss,
    'loss_quantized': quantized_loss,
    'z_std': z_std,
  }
  return value, (quantized.batch_stats, metrics)


def networks(config: ConfigDict) -> Networks:
  """Returns the encoder and predictor of `config.model`."""
  model = config.model
  backbone = models.create(model.backbone.name, num_classes=None, **_fields(model.backbone))
  groups = model.backbone.get('norm_groups', 1)
  if config.base == 'moco':
    return Networks(Encoder(backbone, models.moco_projector(**model.projector)), None)
  projector = models.simsiam_projector(**model.projector, norm_groups=groups)
  predictor = models.simsiam_predictor(
    model.predictor_hidden, model.projector.features, norm_groups=groups
  )
  return Networks(Encoder(backbone, projector), predictor)


def _fields(options: ConfigDict) -> dict[str, Any]:
  return {name: value for name, value in options.items() if name != 'name'}


def moco_loss(queue: Array, temperature: float) -> Callable[[list[Array], list[Array]], Array]:
  """Returns MoCo's loss of one view: the cross-entropy of its key among the queue."""

  def loss(predictions: list[Array], targets: list[Array]) -> Array:
    query = losses.normalize(predictions[0])
    return losses.info_nce_queue(query, targets[0], queue, temperature)[0]

  return loss


def program(config: ConfigDict, variant: str = 'ssql', epochs: int | None = None) -> Program:
  """Returns the pre-training of one variant as pure functions of the configuration.

  Args:
    config: of `mlcollections_configs/ssql`.
    variant: 'base', 'ssql' or 'reverse', see `objective`.
    epochs: in place of `config.epochs`.
  """
  if variant not in ('base', 'ssql', 'reverse'):
    raise ValueError(f"variant={variant!r} is none of 'base', 'ssql', 'reverse' (config.runs).")
  if variant == 'reverse' and config.base == 'moco':
    raise ValueError("runs: 'reverse' is defined for base 'simsiam' and 'byol', not for 'moco'.")
  for bits in (*config.bits.values(), *config.reverse_bits.values()):
    bit_policy(*bits)  # raises for bits that do not exist
  nets = networks(config)
  augment = data.siamese_augment(config.data.image_size, **config.augment)
  steps = config.data.train_size // config.batch_size
  schedule = make_schedule(**config.schedule, epochs=epochs or config.epochs, steps_per_epoch=steps)
  frozen = [] if config.base == 'moco' else ['encoder/projector/fc2/bias']
  optimizer = make_optimizer(learning_rate=schedule, frozen=frozen, **config.optimizer)
  image = (config.data.image_size, config.data.image_size, config.data.channels)

  def init(key: Array) -> TrainState:
    encoder_key, predictor_key, queue_key, step_key = jax.random.split(key, 4)
    images = jnp.zeros((2 * config.model.backbone.get('norm_groups', 1), *image))
    encoder = nets.encoder.init(encoder_key, images, train=True)
    params, stats = {'encoder': encoder['params']}, {'encoder': encoder['batch_stats']}
    if nets.predictor is not None:
      z = jnp.zeros((len(images), config.model.projector.features))
      predictor = nets.predictor.init(predictor_key, z, train=True)
      params['predictor'], stats['predictor'] = predictor['params'], predictor['batch_stats']
    extra = {'key': jax.random.key_data(step_key)}
    if config.base != 'simsiam':
      extra['target'] = {'params': encoder['params'], 'batch_stats': encoder['batch_stats']}
    if config.base == 'moco':
      extra['queue'], extra['queue_pointer'] = losses.queue_init(
        queue_key, config.model.projector.features, config.queue_size
      )
    return TrainState(jnp.int32(0), params, optimizer.init(params), {'batch_stats': stats}, extra)

  def step(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
    view_key, bits_key, order_key = jax.random.split(
      jax.random.wrap_key_data(state.extra['key']), 3
    )
    keys = data.example_keys(view_key, state.step, batch['index'])
    views = data.draw_views(augment, keys, batch['image'])
    bits = draw_bits(jax.random.fold_in(bits_key, state.step), config, variant)
    extra, targets, loss = dict(state.extra), None, siamese_loss
    if config.base == 'byol':
      targets, extra['target'] = models.momentum_pass(
        nets.encoder, state.params['encoder'], extra['target'], views, config.momentum
      )
    elif config.base == 'moco':
      # With statistics per group, a query and its key must not be normalized in the same company.
      order = jax.random.permutation(jax.random.fold_in(order_key, state.step), config.batch_size)
      momentum_keys, extra['target'] = models.momentum_pass(
        nets.encoder, state.params['encoder'], extra['target'], [views[1][order]], config.momentum
      )
      targets, views = [losses.normalize(momentum_keys[0])[jnp.argsort(order)]], views[:1]
      loss = moco_loss(extra['queue'], config.temperature)
      extra['queue'], extra['queue_pointer'] = losses.queue_push(
        extra['queue'], extra['queue_pointer'], targets[0]
      )
    (_, (stats, metrics)), gradient = jax.value_and_grad(
      lambda params: objective(
        nets, params, state.model_state['batch_stats'], views, bits,
        variant=variant, targets=targets, loss=loss, float_term=config.reverse_float_term,
      ),
      has_aux=True,
    )(state.params)  # fmt: skip
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    metrics |= {'learning_rate': schedule(state.step)}
    new = TrainState(
      state.step + 1,
      optax.apply_updates(state.params, updates),
      opt_state,
      {'batch_stats': stats},
      extra,
    )
    return new, metrics

  batch = {
    'image': jax.ShapeDtypeStruct((config.batch_size, *config.data.stored_image), jnp.uint8),
    'index': jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
  }
  return Program(init, step, batch)


def draw_bits(key: Array, config: ConfigDict, variant: str) -> tuple[Array, Array]:
  """Draws one weight and one activation bit-width for all layers and views of a step, ends included."""
  ranges = config.reverse_bits if variant == 'reverse' else config.bits
  keys = jax.random.split(key)
  weight, activation = (
    jax.random.randint(k, (), low, high + 1)
    for k, (low, high) in zip(keys, (ranges.weight, ranges.activation), strict=True)
  )
  return weight, activation


def run(config: ConfigDict, workdir) -> dict[str, Any]:
  """Pre-trains every variant of `config.runs`, evaluates each at all bit-widths, and compares them.

  A run is a variant, `'base'`, `'ssql'` or `'reverse'`, or one with more epochs, `'base*2'`.
  """
  names = {'base': NAMES[config.base], 'ssql': 'SSQL', 'reverse': 'reverse SSQL'}
  plans = [plan(config, item) for item in config.runs]
  sources = {split: training.load_data(config, split) for split in ('train', 'test')}
  backbone = networks(config).encoder.backbone
  policy = functools.partial(bit_policy, prefix='')
  evaluate = quantized_features.evaluator(config, backbone, sources, policy)
  training.say('untrained: features in float and at all bit-widths')
  untrained = jax.jit(program(config, 'base').init)(jax.random.key(config.seed))
  rows = [row('untrained', 'reference', evaluate(backbone_variables(untrained)))]
  for item, (variant, factor, pretraining) in zip(config.runs, plans, strict=True):
    name = names[variant] + (f' {factor}x epochs' if factor > 1 else '')
    state, history = training.train(
      pretraining,
      sources['train'],
      config,
      workdir / item.replace('*', '_x'),
      num_steps=config.epochs * factor * (len(sources['train']) // config.batch_size),
      description=name,
    )
    role = 'reference' if factor > 1 else 'baseline' if variant == 'base' else 'method'
    training.say(f'{name}: features in float and at all bit-widths')
    metrics = evaluate(backbone_variables(state)) | {'z_std': history[-1]['z_std']}
    rows.append(row(name, role, metrics))
  quantized_features.show(config, rows, workdir / 'accuracy_over_bits.png')
  compared = {'baseline': names['base'], 'method': names['ssql']}
  if not {item['name'] for item in rows}.issuperset(compared.values()):
    return results(config, rows)
  return results(config, rows, [{**claim, **compared} for claim in config.claims])


def plan(config: ConfigDict, item: str) -> tuple[str, int, Program]:
  """Returns variant, factor on the epochs, and program of an entry of `config.runs`."""
  variant, _, factor = item.partition('*')
  if not (factor or '1').isdigit():
    raise ValueError(f"runs holds names such as 'ssql' or 'base*2'; got {item!r}.")
  factor = int(factor or 1)
  return variant, factor, program(config, variant, config.epochs * factor)


def backbone_variables(state: TrainState) -> dict[str, PyTree]:
  """Returns the backbone's own variables out of a training state."""
  return {
    'params': state.params['encoder']['backbone'],
    'batch_stats': state.model_state['batch_stats']['encoder']['backbone'],
  }


if __name__ == '__main__':
  launcher.main(run, 'ssql')
