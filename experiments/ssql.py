"""SSQL: Synergistic Self-supervised and Quantization Learning (Cao et al., ECCV 2022).

One network is trained to be quantized to any bit-width afterwards. Every step runs the same weights twice:
in float, and fake-quantized to bit-widths drawn for this step. The features of the quantized pass must
predict the float features of the other view. Claim: after plain min-max quantization to few bits such a
network loses much less than SimSiam (BYOL, MoCo v2), trained for as many steps, does.

  python -m experiments.ssql
  python -m experiments.ssql --config=imagenet_resnet50 --workdir=DIR
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.harness import data as harness_data
from experiments.harness import launcher, results, runs, settings
from experiments.harness.runs import Run, say
from experiments.harness.settings import section
from experiments.protocols import feature_evaluation, pretraining, siamese, siamese_methods
from experiments.protocols.siamese import Networks, Online
from experiments.protocols.siamese_methods import TITLES, Heads, Momentum, siamese_loss
from jaxlab import evaluation, quantizers
from jaxlab.quantizers import Rule
from jaxlab.training import LossState, Out

Array = jax.Array
PyTree = Any

VARIANTS = ('base', 'ssql', 'reverse')


@dataclasses.dataclass(frozen=True)
class Bits:
  """The bit-widths that a step draws from, ends included."""

  weight: tuple[int, int] = (2, 8)
  activation: tuple[int, int] = (4, 8)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    for name in ('weight', 'activation'):
      low, high = getattr(self, name)
      if not 1 <= low <= high <= 16:
        yield f'{name}={low, high}: expected two numbers in [1, 16], the smaller one first.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(pretraining.Settings):
  """Settings of SSQL.

  Attributes:
    base: the method that SSQL builds on and is compared with.
    heads: over the backbone.
    target: of the base method.
    bits: drawn by SSQL.
    reverse_bits: drawn by its reverse.
    reverse_float_term: averages the base loss in there, too, as SSQL does. Whether the authors did is not
      known; without it the variant is what its description says.
    runs: rows, of `VARIANTS`; `'base*2'` is trained for twice the epochs.
  """

  base: Literal['simsiam', 'byol', 'moco'] = 'simsiam'
  heads: Heads = section(Heads)
  target: Momentum = section(Momentum)
  bits: Bits = section(Bits)
  reverse_bits: Bits = dataclasses.field(default_factory=lambda: Bits((4, 16), (4, 16)))
  reverse_float_term: bool = False
  runs: tuple[str, ...] = ('base', 'ssql')

  @classmethod
  def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
    """Puts in what claims compare: SSQL with its base."""
    own = {'baseline': TITLES.get(values.get('base', 'simsiam'), ''), 'method': 'SSQL'}
    claims = values.get('claims', ())
    return {**values, 'claims': [{**own, **c} if isinstance(c, Mapping) else c for c in claims]}


def bit_rules(weight_bits: Any, output_bits: Any, prefix: str = 'backbone/') -> list[Rule]:
  """Returns SSQL's rules: stem 8/8, projector's weights 8, all else in the backbone as drawn.

  Outputs are quantized after each ReLU: inside a residual branch, and after the sum. The predictor and the
  outputs of the projector stay in float. With `prefix=''` the rules are those of the backbone alone.
  """
  return [
    Rule(f'{prefix}conv1', 'kernel', 8),
    Rule(f'{prefix}layer.*', 'kernel', weight_bits),
    *([Rule('projector/.*', 'kernel', 8)] if prefix else []),
    Rule(f'{prefix}relu', 'output', 8),
    Rule(rf'{prefix}layer.*/relu\d', 'output', output_bits),
  ]


def draw_bits(key: Array, bits: Bits) -> tuple[Array, Array]:
  """Draws one weight and one activation bit-width for all layers and views of a step, ends included."""
  keys = jax.random.split(key)
  weight, activation = (
    jax.random.randint(k, (), low, high + 1)
    for k, (low, high) in zip(keys, (bits.weight, bits.activation), strict=True)
  )
  return weight, activation


def online_pass(
  nets: Networks,
  params: PyTree,
  batch_stats: PyTree,
  views: list[Array],
  rules: Sequence[Rule],
  ranges: PyTree = None,
) -> Online:
  """Runs encoder and predictor over the views: in float, recording ranges, or quantized with given ranges.

  With ranges, those of the float pass, activation scales are constants, and weight scales pass gradient to
  each channel's extreme weight. See `siamese.online_pass`.
  """
  if ranges is None:  # of the rules only the patterns matter
    hooks = quantizers.range_hooks(rules)
    return siamese.online_pass(nets, params, batch_stats, views, mutable=('ranges',), hooks=hooks)
  # A dead channel keeps its whole tensor in float, as in the official code.
  own = {'degenerate': 'tensor'}
  encoder = quantizers.quantize_weights(params['encoder'], rules, scale_grad=True, **own)
  params, hooks = {**params, 'encoder': encoder}, quantizers.fake_quantize_hooks(rules, **own)
  return siamese.online_pass(
    nets, params, batch_stats, views, given={'ranges': ranges}, hooks=hooks
  )


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

  With predictions `p` and projections `z` of the views, `q` where quantized, 'base' is `L(p, z)`; 'ssql'
  `(L(p, z) + L(p_q, z)) / 2`, as the official code (the paper sums the two); 'reverse' `L(p, z_q)`.

  Args:
    nets: the modules; `params` and `batch_stats` have the same keys.
    params: trained.
    batch_stats: running statistics.
    views: the augmented views; MoCo's online network sees the first alone.
    bits: weight and activation bit-widths of this step, scalars, traced or not.
    variant: of `VARIANTS`.
    targets: a momentum network's features of the views; None: the online network's own (SimSiam).
    loss: `L`, `(predictions, targets) -> scalar`.
    float_term: see `Settings.reverse_float_term`.
  """
  rules = bit_rules(*bits)
  in_float = online_pass(nets, params, batch_stats, views, rules)
  z = in_float.projections if targets is None else targets
  base = loss(in_float.predictions, z)
  z_std = evaluation.feature_std(jax.lax.stop_gradient(in_float.projections[0]))
  if variant == 'base':
    return base, (in_float.batch_stats, {'z_std': z_std})
  online = params if variant == 'ssql' else jax.lax.stop_gradient(params)
  quantized = online_pass(
    nets, online, in_float.batch_stats, views, rules, in_float.collections['ranges']
  )
  if variant == 'ssql':
    own = loss(quantized.predictions, z)
  else:
    own = loss(in_float.predictions, jax.lax.stop_gradient(quantized.projections))
  value = (base + own) / 2 if variant == 'ssql' or float_term else own
  metrics = {'loss_float': base, 'loss_quantized': own, 'z_std': z_std}
  return value, (quantized.batch_stats, metrics)


def base_method(config: Settings) -> tuple[Networks, siamese.Targets]:
  """Returns encoder and predictor of the base method, and what its predictions are compared with.

  BYOL is the authors' own here: it has SimSiam's heads and loss.
  """
  if config.base == 'byol':
    nets, share = siamese_methods.predicted(config.model, config.heads), config.target.momentum
    return nets, siamese_methods.momentum_encoder(share, siamese_loss)
  own = config.model, config.heads, config.target, pretraining.length(config)
  return siamese_methods.method(config.base, *own)


def training(config: Settings, item: str) -> Run:
  """Returns the pretraining of an entry of `config.runs`."""
  variant, factor = plan(item)
  nets, targets = base_method(config)
  own_bits = config.reverse_bits if variant == 'reverse' else config.bits
  images = jnp.zeros((2 * config.model.get('norm_groups', 1), *config.data.view))
  init = siamese.init(nets, targets, images, ('bits',))

  def loss(
    params: PyTree, state: LossState, views: list[Array], keys: dict[str, Array]
  ) -> tuple[Array, Out]:
    seen = targets.see(nets.encoder, state.extra, views, keys['order'], state.step)
    value, (stats, metrics) = objective(
      nets, params, state.model_state['batch_stats'], seen.views, draw_bits(keys['bits'], own_bits),
      variant=variant, targets=seen.targets, loss=seen.loss, float_term=config.reverse_float_term,
    )  # fmt: skip
    return value, Out({'batch_stats': stats}, seen.extra, metrics)

  own = ('base', 'heads', 'target', 'bits', 'reverse_bits', 'reverse_float_term')
  return pretraining.training(
    config, title(config, item), init, loss,
    epochs=config.recipe.epochs * factor,
    after=targets.after,
    frozen=() if config.base == 'moco' else ('encoder/projector/fc2/bias',),
    decides={'variant': variant, **{name: getattr(config, name) for name in own}},
  )  # fmt: skip


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from pretraining.check(config)
  rules = functools.partial(bit_rules, prefix='')
  yield from feature_evaluation.check(config.eval, config.data.train_size, rules)
  rows = [rf'{title(config, variant)}( \d+x epochs)?' for variant in VARIANTS]
  yield from results.check_claims(config, ['untrained', *rows], [*config.eval.metrics(), 'z_std'])
  if config.heads.style != 'own' or config.target.final is not None:
    yield 'heads.style, target.final: SSQL and its base have the heads and the constant share of the paper.'
  if config.base == 'moco' and 'reverse' in str(config.runs):
    yield "runs: 'reverse' is defined for base 'simsiam' and 'byol', not for 'moco'."
  yield from siamese_methods.check((config.base,), config.recipe, config.target)
  for item in config.runs:
    yield from settings.found_by('runs', plan, item)
  yield from settings.found_by('model', base_method, config)


def plan(item: str) -> tuple[str, int]:
  """Returns variant and factor on the epochs of an entry of `runs`."""
  found = re.fullmatch(rf'({"|".join(VARIANTS)})(?:\*([1-9]\d*))?', item)
  if not found:
    raise ValueError(f"expected names such as 'ssql' or 'base*2', of {VARIANTS}; got {item!r}.")
  return found[1], int(found[2] or 1)


def title(config: Settings, item: str) -> str:
  """Returns the name of the row of an entry of `runs`."""
  variant, factor = plan(item)
  name = {'base': TITLES[config.base], 'ssql': 'SSQL', 'reverse': 'reverse SSQL'}[variant]
  return name if factor == 1 else f'{name} {factor}x epochs'


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings by the names of `config.runs`."""
  del facts
  return {item: training(config, item) for item in config.runs}


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Pretrains every variant of `config.runs`, evaluates each at all bit-widths, and compares them."""
  sources = {split: harness_data.load(config.data, split) for split in ('train', 'test')}
  backbone, rules = (
    base_method(config)[0].encoder.backbone,
    functools.partial(bit_rules, prefix=''),
  )
  judge = feature_evaluation.evaluator(config, backbone, sources, rules)

  def evaluate(name: str, variables: runs.Variables) -> dict[str, float]:
    say(f'{name}: features in float and at all bit-widths')
    return judge(siamese.backbone_variables(variables))

  drawn = jax.jit(training(config, 'base').program.init)(jax.random.key(config.seed))
  rows = [results.row('untrained', 'reference', evaluate('untrained', runs.variables_of(drawn)))]
  for item, own in programs(config).items():
    variant, factor = plan(item)
    folder, judged = workdir / item.replace('*', '_x'), functools.partial(evaluate, own.title)
    trained = runs.train(own, sources['train'], folder, evaluate=judged)
    z_std = pretraining.say_collapse(own.title, trained.history)
    role = 'reference' if factor > 1 else 'baseline' if variant == 'base' else 'method'
    rows.append(results.row(own.title, role, {**judged(trained.variables), 'z_std': z_std}))
  feature_evaluation.draw(config, rows, workdir / 'accuracy_over_bits.png')
  return results.results(config, rows, feature_evaluation.shown(config, 'z_std'), 'accuracies in %')


if __name__ == '__main__':
  launcher.main('ssql')
