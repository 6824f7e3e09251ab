"""GPLQ: a General, Practical, and Lightning QAT Method for Vision Transformers (Liang et al., NeurIPS 2025).

Few-bit activations cost a transformer far more than few-bit weights, and long training under quantization
leaves the basin of the pre-trained network. So activations come first: one epoch at a small constant learning
rate trains all weights, in float, and the steps of all activations, while the features are held to the float
network's in the directions in which those vary most. Then the weights are quantized as they are, and QwT's
linear layers give back a part of what that costs. Claim: close to float at 4 bits after an epoch, far above
post-training quantization at 3, and as good on classes that it never saw as the float network.

  python -m experiments.gplq
  python -m experiments.gplq --config=swin_tiny --workdir=DIR
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

from experiments.harness import launcher, networks, pictures, results
from experiments.harness.data import Images
from experiments.harness.networks import feature_path, feature_vector
from experiments.harness.results import row
from experiments.harness.runs import Run, Variables, say
from experiments.harness.sections import check_bits
from experiments.harness.settings import found_by, section
from experiments.harness.supervised import Loss, Seen, cross_entropy
from experiments.protocols import block_penalty, quantized_scores, quantized_training
from experiments.protocols.block_penalty import Penalty
from experiments.protocols.colinearity import Decay, decayed
from experiments.protocols.feature_evaluation import Probe
from experiments.protocols.quantized_scores import Scores
from experiments.protocols.quantized_training import (
  FLOAT,
  Stage,
  Trained,
  feature_shape,
)
from jaxlab import data, losses, models, quantizers
from jaxlab.quantizers import Quantized, compensation

Array = jax.Array

# What is measured at every bit-width, and what is the same at all of them.
METRICS = (*quantized_scores.METRICS, 'pca_error')
COSTS = ('time', 'memory')
ROLES = {
  'float': 'reference', 'float again': 'reference', 'weights alone': 'reference',
  'activations alone': 'reference', 'PTQ': 'baseline', 'PTQ + QwT': 'baseline', 'RepQ-ViT': 'baseline',
  'RepQ-ViT + QwT': 'baseline', 'direct QAT': 'baseline', 'activations trained, no mimicking': 'reference',
  'activations trained': 'reference', 'GPLQ, no mimicking': 'reference', 'GPLQ': 'method',
  'GPLQ + QwT': 'method',
}  # fmt: skip
# Rows that are trained, by the first part of the names of their stages; each bit-width is a stage.
TRAINED = {
  'direct': 'direct QAT',
  'no_mimicking': 'activations trained, no mimicking',
  'activations': 'activations trained',
}


@dataclasses.dataclass(frozen=True)
class Mimicking:
  """Features that follow the float network's.

  Attributes:
    weight: of the loss.
    images: training images whose features the principal components are fitted on; 0: all.
    share: of their variance that the components explain.
    multiple: that their number is rounded up to; 32, and less below 64 dimensions.
  """

  weight: float = 1.0
  images: int = 5120
  share: float = 0.6
  multiple: int = 32

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not self.weight > 0:
      yield f'weight={self.weight}: expected a positive number.'
    if self.images < 0:
      yield f'images={self.images}: expected a number of images, or 0 for all.'
    if not 0 < self.share <= 1:
      yield f'share={self.share}: expected a share in (0, 1].'
    if self.multiple < 1:
      yield f'multiple={self.multiple}: expected at least 1.'


@dataclasses.dataclass(frozen=True)
class Steps:
  """The learned steps of activations: of each channel, or of a whole input; and those within attention."""

  granularity: Literal['channel', 'tensor'] = 'channel'
  attention: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(quantized_training.Settings):
  """Settings of GPLQ; `recipe` is that of the first stage, and of all rows that are trained.

  Attributes:
    steps: of activations.
    mimicking: of the float features.
    symmetric: whether weights have no zero point.
    qwt: the linear layers behind blocks.
    batch_size: of the inputs that they are fitted on, those of the calibration.
    rows: trained besides GPLQ: 'direct' (weights and activations together, with the same loss on features),
      'no_mimicking' (GPLQ without that loss), 'float' (the float network for another epoch).
    transfer: data sets of classes that the network never saw, each with a linear probe on its features.
    probe: the classifier.
    penalty: TWEO's term in the loss that the float network is trained with; None: none.
    decay: Colinearity Decay in the optimizer that the float network is trained with; None: none.
  """

  bits: tuple[str, ...] = ('4w4a',)
  steps: Steps = section(Steps)
  mimicking: Mimicking = section(Mimicking)
  symmetric: bool = True
  qwt: compensation.QwT = dataclasses.field(
    default_factory=lambda: compensation.QwT(ridge=1e-4, relative=True)
  )
  batch_size: int = 32
  rows: tuple[Literal['direct', 'no_mimicking', 'float'], ...] = ('direct', 'no_mimicking')
  transfer: dict[str, Images] = dataclasses.field(default_factory=dict)
  probe: Probe = section(Probe)
  penalty: Penalty | None = None
  decay: Decay | None = None

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    yield from check_bits(self.bits, quantizers.MIN_BITS, quantizers.MAX_BITS)
    if self.batch_size < 1 or self.calibration % self.batch_size:
      yield f'batch_size={self.batch_size}: expected a divisor of calibration={self.calibration}.'
    for name, other in self.transfer.items():
      yield from quantized_training.check_view(f'transfer.{name}', other, self.network.data.view)
    for name in ('penalty', 'decay'):
      if getattr(self, name) is not None and self.network.recipe is None:
        yield f'{name}: is of the training of the float network, but network.recipe is none.'

  @property
  def float_training(self) -> Mapping[str, Any]:
    """Options of the training of the float network: nothing, TWEO's term, Colinearity Decay, or both."""
    own, found, decides = self.network, {}, {}
    if self.penalty is not None:
      blocks = models.anatomy(networks.create(own.model)).block_paths
      loss = block_penalty.penalized(own, self.penalty, losses.tweo_loss)
      found |= {'loss': loss, 'captured': [models.any_of(blocks)]}
      decides['penalty'] = self.penalty
    if self.decay is not None:
      found['optimizer'] = functools.partial(decayed, own, self.decay)
      decides['decay'] = self.decay
    return {**found, 'decides': decides}


def quantized_activations(
  config: Settings, bits: int, model: nn.Module, variables: Variables, inputs: Array
) -> Quantized:
  """Returns the network with learned steps for its activations, stem and classifier at 8 bits."""
  rules = quantizers.activation_rules(
    models.anatomy(model), bits, **dataclasses.asdict(config.steps)
  )
  return quantizers.activation_qat(model, variables, inputs, rules)


def quantized_together(
  config: Settings, bits: tuple[int, int], model: nn.Module, variables: Variables, inputs: Array
) -> Quantized:
  """Returns the network with learned steps for activations and kernels: what GPLQ is compared with."""
  network = quantized_activations(config, bits[1], model, variables, inputs)
  rules = quantized_training.edge_rules(model, bits[0], None, learned=True)
  return quantizers.weight_only_lsq(network, rules)


def quantized_weights(config: Settings, bits: int, network: Quantized) -> Quantized:
  """Returns GPLQ's second stage without compensation: the kernels of a network behind its activations."""
  rules = quantized_training.edge_rules(network.model, bits, None)
  return quantizers.weight_only_ptq(network, rules, symmetric=config.symmetric)


def mimicking_loss(weight: float, path: str) -> Loss:
  """Returns cross-entropy plus the distance of the features within the principal subspace."""

  def loss(logits: Array, labels: Array, seen: Seen) -> Array:
    student, teacher = (feature_vector(found[path]) for found in (seen.captured, seen.taught))
    mimicked = losses.pca_mimicking_loss(student, teacher, **seen.constants)
    return cross_entropy(logits, labels, seen) + weight * mimicked

  return loss


def components(config: Settings, features: Array) -> dict[str, Array]:
  """Returns mean and components of features; columns beyond the chosen components are zeros."""
  own = config.mimicking
  found = losses.fit_principal_components(features, share=own.share, multiple=own.multiple)
  dim, count = found.components.shape
  say(f'features mimicked in {count} of {dim} dimensions')
  return {
    'mean': found.mean,
    'components': jnp.pad(found.components, ((0, 0), (0, dim - count))),
  }


def table(config: Settings, widths: Sequence[str] | None = None) -> dict[str, Stage]:
  """Returns the trainings of an epoch: GPLQ's first stage at every bit-width, and those that it meets.

  Args:
    config: the settings.
    widths: bit-widths; None: all.
  """
  path = feature_path(networks.create(config.network.model))
  dim = feature_vector(feature_shape(config)).shape[-1]
  shapes = {'mean': (dim,), 'components': (dim, dim)}
  mimicked = {
    'teacher': FLOAT,
    'captured': (path,),
    'loss': mimicking_loss(config.mimicking.weight, path),
    'constants': {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()},
  }
  found = {}
  for bits in config.bits if widths is None else widths:
    kernels, inputs = width = quantizers.parse_bits(bits)
    activations = functools.partial(quantized_activations, config, inputs)
    stage = functools.partial(Stage, recipe=config.recipe, learned=('activation_steps',))
    own = {'activation_bits': inputs, 'steps': config.steps}
    with_loss = {**own, 'mimicking': config.mimicking}
    found[f'activations_{bits}'] = stage(
      f'{TRAINED["activations"]}, {bits}',
      'method',
      quantize=activations,
      decides=with_loss,
      **mimicked,
    )
    if 'no_mimicking' in config.rows:
      found[f'no_mimicking_{bits}'] = stage(
        f'{TRAINED["no_mimicking"]}, {bits}', 'reference', quantize=activations, decides=own
      )
    if 'direct' in config.rows:
      found[f'direct_{bits}'] = stage(
        f'{TRAINED["direct"]}, {bits}', 'baseline', learned=('activation_steps', 'lsq'),
        quantize=functools.partial(quantized_together, config, width),
        decides={**with_loss, 'kernel_bits': kernels}, **mimicked,
      )  # fmt: skip
  # For its cost, if not for its row.
  again = quantized_training.in_float
  return found | {'float_again': Stage('float again', 'reference', config.recipe, again)}


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  found = list(quantized_training.check(config, {'recipe': config.recipe}))
  yield from found
  kinds = '|'.join([*METRICS, *(f'transfer_{name}' for name in config.transfer)])
  metrics = [rf'({"|".join(config.bits)})_({kinds})', '|'.join(COSTS)]
  yield from results.check_claims(config, list(map(re.escape, ROLES)), metrics)
  if any(problem.startswith('network.model') for problem in found):
    return
  if config.penalty is not None:
    yield from block_penalty.check(config.penalty, losses.tweo_loss)
  if config.decay is not None and config.network.recipe is not None:
    yield from found_by(
      'decay', decayed, config.network, config.decay, optax.constant_schedule(0.1)
    )
  blocks = models.anatomy(networks.create(config.network.model)).blocks
  if not blocks:
    yield 'network.model: the network has no blocks, which QwT compensates.'
  if config.qwt.relative and any(
    part.kind == 'conv' for block in blocks for part in block.branches
  ):
    yield (
      'qwt.relative=True: the network has blocks of convolutions, whose ridge is absolute: '
      '--config.qwt.relative=false --config.qwt.ridge=none.'
    )
  dim = feature_vector(feature_shape(config)).shape[-1]
  if (count := config.mimicking.images or config.network.data.train_size) < dim:
    yield (
      f'mimicking.images={config.mimicking.images}: {count} images have fewer principal components than the '
      f'features have dimensions, {dim}.'
    )


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings by name: of the float network, and those under quantization at the last bit-width.

  Those of other widths are the same programs: bits are arrays.
  """
  del facts
  found = table(config, config.bits[-1:])
  if 'float' not in config.rows:
    del found['float_again']  # measured, not trained
  return quantized_training.programs(config, found)


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains and quantizes at every bit-width, and compares accuracy, transfer, weights and costs."""
  nets = Trained(config, table(config), workdir)
  judge = Judge(config, nets)
  nets.constants = dict.fromkeys(nets.table, judge.components)
  batches = nets.loaded.calibration(config.calibration, config.batch_size)
  blocks = models.any_of(models.anatomy(nets.loaded.model).block_paths)
  rows: dict[str, dict[str, float]] = {title: {} for title in ROLES}

  def add(title: str, bits: str, found: dict[str, float]) -> None:
    rows[title] |= {f'{bits}_{metric}': value for metric, value in found.items()}
    say(f'{title}, {bits}: ' + ', '.join(f'{k} {v:.4g}' for k, v in found.items()))

  def add_both(title: str, bits: str, network: Quantized, **more: float) -> None:
    """Adds a network of quantized kernels, and the same with QwT behind its blocks."""
    add(title, bits, judge(network) | more)
    better = compensation.compensate(network, batches, config.qwt, blocks=blocks)
    add(f'{title} + QwT', bits, judge(better) | more)

  # Of all bit-widths: they are the same programs.
  costs = nets.costs(table(config, config.bits[-1:]), 'float_again')
  exact, again = nets[FLOAT], 'float_again'
  alike = {'float': judge(exact)}
  if 'float' in config.rows:
    alike['float again'] = judge(nets[again]) | judge.moved(nets[again])
    rows['float again'] |= costs[again]
  for bits in config.bits:
    for title, found in alike.items():
      add(title, bits, found)
    kernels, inputs = quantizers.parse_bits(bits)
    weights = functools.partial(quantized_weights, config, kernels)
    start = nets.start(f'activations_{bits}')
    add('weights alone', bits, judge(weights(exact)))
    add('activations alone', bits, judge(start))
    add_both('PTQ', bits, weights(start))
    if 'batch_stats' not in nets.loaded.variables:
      rules = quantized_training.edge_rules(exact.model, kernels, inputs)
      given = exact.model, nets.loaded.variables, nets.inputs, rules
      add_both('RepQ-ViT', bits, quantizers.repq(*given))
    for kind, title in TRAINED.items():
      if (name := f'{kind}_{bits}') not in nets.table:
        continue
      trained, cost = nets[name], costs.get(name, {})
      moved = judge.moved(trained)
      add(title, bits, judge(trained) | moved)
      rows[title] |= cost
      if kind == 'no_mimicking':
        add('GPLQ, no mimicking', bits, judge(weights(trained)) | moved)
      elif kind == 'activations':
        add_both('GPLQ', bits, weights(trained), **moved)
        for own in ('GPLQ', 'GPLQ + QwT'):
          rows[own] |= cost
  listed = [row(title, ROLES[title], own) for title, own in rows.items() if own]
  kinds = [METRICS[0], *(f'transfer_{name}' for name in config.transfer)]
  panels = {f'{kind} (%)': {bits: f'{bits}_{kind}' for bits in config.bits} for kind in kinds}
  pictures.bars(workdir / 'accuracy_and_transfer.png', config, listed, panels)
  shown = [f'{bits}_{kind}' for bits in config.bits for kind in (*kinds, *METRICS[1:])]
  note = 'accuracies in %; time and memory of a step over those of the float network'
  return results.results(config, listed, [*shown, *COSTS], note)


class Judge:
  """Measures networks: `judge(network) -> metrics`, those of `Scores` and `pca_error`.

  That is the squared distance of the features of a test image from the float network's within the principal
  subspace, over the float features' variance there.

  Attributes:
    components: of the float features.
    moved: see `Scores`.
  """

  def __init__(self, config: Settings, nets: Trained):
    self._nets, train = nets, nets.loaded.train
    if config.mimicking.images and config.mimicking.images < len(train):
      chosen = np.random.default_rng((config.seed, 1)).permutation(len(train))
      train = data.subset(train, chosen[: config.mimicking.images])
    self.components = components(config, nets.outputs(nets[FLOAT], source=train)['features'])
    self._exact = nets.outputs(nets[FLOAT])['features']
    self._spread = self._distance(np.broadcast_to(self._exact.mean(0), self._exact.shape))
    self._scores = Scores(nets, config.transfer, config.probe)
    self.moved = self._scores.moved

  def _distance(self, features: Array) -> float:
    found = losses.pca_mimicking_loss(features, self._exact, **self.components)
    return float(jnp.mean(found))

  def __call__(self, network: Quantized) -> dict[str, float]:
    """Returns the metrics of a network."""
    outputs = self._nets.outputs(network)
    found = self._scores(network, outputs)
    return {**found, 'pca_error': self._distance(outputs['features']) / self._spread}


if __name__ == '__main__':
  launcher.main('gplq')
