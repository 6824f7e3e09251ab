import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tables
from flax import linen as nn
from golden_vectors import assert_close, golden
from meshes import assert_same, on_one_and_on_eight

from experiments import us3l
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import slimmable
from experiments.protocols.slimmable import Guidance, Networks, Step, Widths
from jaxlab import models

TINY = (
  "model={'name': 'cifar_resnet18', 'stage_sizes': (1,), 'width': 16, 'strides': (2,)}",
  *(f'heads.{name}=8' for name in ('hidden', 'features', 'predictor')),
  'recipe.epochs=4',
  'recipe.batch_size=16',
  'data.train_size=32',
  'widths.judged=0.5,1.0',
  'widths.step=0.25',
  'widths.passes=1',
)


def tiny_config(*changes):
  return launcher.load('us3l', 'embedded', [*TINY, *changes])


class TwoConvolutions(nn.Module):
  """The network of the golden iteration."""

  channels: tuple[int, int]

  def narrowed(self, width):
    return self.clone(channels=tuple(models.make_divisible(c * width) for c in self.channels))

  @nn.compact
  def __call__(self, x, train=False):
    for index, (channels, stride) in enumerate(zip(self.channels, (1, 2)), 1):
      padding = [(1, 1), (1, 1)]
      x = nn.Conv(channels, (3, 3), stride, padding, use_bias=False, name=f'conv{index}')(x)
      x = nn.relu(models.BatchNorm(name=f'bn{index}')(x, train))
    return jnp.mean(x, (1, 2))


def leaf_of(tensors, name):
  a = tensors[name]
  return jnp.float32(a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T)


def tree_of(tensors):
  """Returns the parameters of the golden iteration as those of our modules."""

  def layer(prefix, kind):
    names = (
      {'kernel': 'weight', 'bias': 'bias'} if kind == 'fc' else {'scale': 'weight', 'bias': 'bias'}
    )
    return {
      own: leaf_of(tensors, f'{prefix}.{theirs}')
      for own, theirs in names.items()
      if f'{prefix}.{theirs}' in tensors
    }

  def encoder(name):
    backbone = {f'conv{i}': layer(f'{name}.conv{i}', 'fc') for i in (1, 2)}
    backbone |= {f'bn{i}': layer(f'{name}.bn{i}', 'bn') for i in (1, 2)}
    projector = {f'fc{i}': layer(f'{name}.fc.{j}', 'fc') for i, j in enumerate((0, 3, 6))}
    projector |= {f'bn{i}': layer(f'{name}.fc.{j}', 'bn') for i, j in enumerate((1, 4))}
    return {'backbone': backbone, 'projector': projector}

  def head(name):
    return {
      'fc0': layer(f'{name}.0', 'fc'),
      'bn0': layer(f'{name}.1', 'bn'),
      'fc1': layer(f'{name}.3', 'fc'),
    }

  online = {
    'encoder': encoder('encoder_q'),
    'predictor': head('predictor'),
    'distiller': head('predictor_new'),
  }
  return online, encoder('encoder_k')


@golden('us3l', 'us_byol_iteration')
def test_an_iteration_agrees_with_the_official_code(vectors):
  params, teacher = tree_of(vectors.tree('before__'))
  kernels = [params['encoder']['backbone'][f'conv{i}']['kernel'] for i in (1, 2)]
  dim = params['encoder']['projector']['fc0']['kernel'].shape[1]
  head = models.simsiam_predictor(dim, dim)
  projector = models.MLPHead((dim, dim, dim), hidden_bias=(True, False))
  backbone = TwoConvolutions(tuple(kernel.shape[-1] for kernel in kernels))
  nets = Networks(models.Encoder(backbone, projector), head, head)
  optimizer = optax.chain(optax.trace(vectors.param('sgd_momentum')), optax.scale(-1.0))
  widths = tuple(sorted(vectors['in_widths'].tolist(), reverse=True))
  momentum = vectors.param('ema_momentum')
  step = Step(nets, Guidance(), widths[1:], optimizer, momentum)
  views = [jnp.float32(vectors[f'in_x{i}_nchw'].transpose(0, 2, 3, 1)) for i in (1, 2)]
  iterate = jax.jit(functools.partial(slimmable.iterate, step))
  drawn = jnp.arange(len(widths) - 1)
  rate = vectors.param('lr')
  found = iterate(params, optimizer.init(params), teacher, views, rate, drawn)
  assert_close(found.losses, vectors['out_losses'], 5e-5, 1e-6)
  for index, z in enumerate(found.targets, 1):
    assert_close(z, vectors[f'out_teacher_z{index}'], 5e-5)
  after, after_teacher = tree_of(vectors.tree('after__'))
  for own, expected in ((found.params, after), (found.teacher, after_teacher)):
    jax.tree.map(lambda a, b: assert_close(a, b, 5e-5), own, expected)


@golden('us3l', 'losses')
def test_both_losses_agree_with_the_official_code(vectors):
  p, z = ([jnp.float32(vectors[f'in_{name}{i}']) for i in (1, 2)] for name in 'pz')
  for kind in ('cosine', 'infonce'):
    loss = functools.partial(
      slimmable.compare, kind, targets=z, temperature=vectors.param('temperature')
    )
    value, gradient = jax.jit(jax.value_and_grad(lambda p, loss=loss: loss(predictions=p)))(p)
    assert_close(value, vectors[f'out_{kind}_loss'], 1e-6, 1e-6)
    for index, found in enumerate(gradient, 1):
      assert_close(found, vectors[f'grad_{kind}_p{index}'], 5e-6)


def test_narrow_widths_lie_between_the_floor_and_the_whole():
  own, keys = Widths(), jax.random.split(jax.random.key(0), 64)
  drawn = jax.jit(jax.vmap(lambda key: slimmable.draw_widths(key, 4, 8, own, True)))(
    keys
  )  # the third of four quarters
  widths = np.asarray(own.drawn)[np.asarray(drawn)]
  assert set(widths[:, 1]) == {0.5} and np.all(widths[:, 0] >= widths[:, 1])  # the wider one first
  assert set(widths[:, 0]) == {0.5, 0.625, 0.75, 0.875, 1.0}
  whole = jax.vmap(lambda key: slimmable.draw_widths(key, 0, 8, own, False))(keys)
  assert set(np.asarray(whole)[:, 1]) == {0} and len(set(np.asarray(whole)[:, 0].tolist())) == 7


@pytest.mark.parametrize('growing', [True, False])
def test_narrow_passes_are_those_that_are_drawn(growing):
  own, epochs, keys = Widths(), 10, jax.random.split(jax.random.key(0), 4000)
  draw = jax.jit(
    lambda epoch: jax.vmap(lambda key: slimmable.draw_widths(key, epoch, epochs, own, growing))(
      keys
    )
  )
  expected = np.zeros(len(own.drawn))
  for epoch in range(2 if growing else 0, epochs):  # a quarter of 10 epochs are 2
    expected += np.bincount(np.ravel(draw(epoch)), minlength=len(own.drawn)) / len(keys) / epochs
  found = slimmable.narrow_passes(epochs, own, growing)
  np.testing.assert_allclose(found, expected, atol=0.01)
  np.testing.assert_allclose(found.sum(), 1.6 if growing else 2)


def test_costs_are_weighted_by_what_is_drawn(monkeypatch):
  prices = {'()': 10.0, '(0.25,)': 11.0, '(0.5,)': 12.0, '(0.75,)': 14.0, '(1.0,)': 20.0}
  measured = []

  def measure(sides, mesh, repeats):
    del mesh
    measured.append((len(sides), repeats))
    price = {name: prices.get(name.split(') ')[1], 0.0) for name in sides}
    return {
      name: {'gigaflops': cost, 'milliseconds': 2 * cost + 1, 'megabytes': 7.0}
      for name, cost in price.items()
    }

  monkeypatch.setattr(us3l.costs, 'measure', measure)
  assert us3l.relative_costs(tiny_config()) == {} and not measured
  found = us3l.relative_costs(tiny_config('runs=us3l,sandwich,naive', 'timed=2'))
  assert measured == [(12, 2)]  # the first two differ in what they draw alone
  # Floors 0.75, 0.5 and 0.25 a quarter each. Above these: 0.75 and 1 a half each; 0.5 and 1 a quarter each,
  # 0.75 a half; 0.25 and 1 a sixth each, 0.5 and 0.75 a third each.
  floors = (1 + 2 + 4) / 4
  above = ((4 + 10) / 2 + (2 + 10) / 4 + 4 / 2 + (1 + 10) / 6 + (2 + 4) / 3) / 4
  growing, whole = 10 + floors + above, 10 + 1 + (1 + 10) / 6 + (2 + 4) / 3
  assert found['us3l']['gigaflops'] == pytest.approx(growing)
  assert found['us3l']['milliseconds'] == pytest.approx(2 * growing + 1)
  assert found['us3l']['relative_flops'] == pytest.approx(growing / whole)
  assert found['us3l']['relative_time'] == pytest.approx((2 * growing + 1) / (2 * whole + 1))
  assert found['sandwich']['gigaflops'] == pytest.approx(whole)
  assert found['sandwich']['relative_flops'] == 1 and found['naive'] == found['us3l']
  assert found['us3l']['megabytes'] == 7


def branch_counts(jaxpr):
  """Yields the number of branches of each conditional in a program."""
  for equation in jaxpr.eqns:
    yield len(equation.params.get('branches', ()))
    for part in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda a: hasattr(a, 'eqns')
    ):
      inner = getattr(part, 'jaxpr', part)
      if hasattr(inner, 'eqns'):
        yield from branch_counts(inner)


def test_a_step_holds_a_branch_for_each_width():
  config = tiny_config('runs=us3l,')
  for fixed, most in ((None, len(config.widths.drawn)), ((0.5,), 2), ((), 0)):
    program = us3l.training_of(config, 'us3l', fixed).program
    state = jax.eval_shape(program.init, jax.random.key(0))
    traced = jax.make_jaxpr(program.step)(state, {}, program.batch)
    assert max(branch_counts(traced.jaxpr)) == most  # 2: whether there are narrow networks at all


@pytest.mark.exhaustive
@pytest.mark.parametrize('name', tables.few(['us3l', 'naive', 'online'], 'us3l'))
def test_the_first_quarter_trains_the_whole_network_alone(name):
  config = tiny_config(f'runs={name},')
  program = us3l.programs(config)[name].program
  state, step = jax.jit(program.init)(jax.random.key(0)), jax.jit(program.step)
  rng, passes = np.random.default_rng(0), []
  for _ in range(3):  # 2 steps an epoch, 4 epochs
    image = jnp.asarray(rng.integers(0, 256, (16, 16, 16, 1), np.uint8))
    before = state
    state, metrics = step(state, {}, {'image': image, 'index': jnp.arange(16, dtype=jnp.int32)})
    passes.append(float(metrics['passes']))
    assert np.isfinite(metrics['loss']) and np.isnan(metrics['loss_narrow']) == (passes[-1] == 1)
  assert passes == [1, 1, 3] and int(state.step) == 3
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before.params, state.params)
  if name != 'naive':  # only decay moves what has a vanishing gradient
    assert all(jax.tree.leaves(moved['distiller']))


@pytest.mark.exhaustive
def test_a_step_is_the_same_on_one_and_on_eight_devices():
  program = us3l.programs(tiny_config('runs=us3l,', 'group_decay=none'))['us3l'].program
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.integers(0, 256, (16, 16, 16, 1), np.uint8))
  batch = {'image': image, 'index': jnp.arange(16, dtype=jnp.int32)}
  late = lambda state: state.replace(step=jnp.int32(4))  # noqa: E731 (narrow networks learn, too)
  found = on_one_and_on_eight(program, [batch], prepare=late, fsdp_min_size=64)
  start = jax.jit(program.init)(jax.random.key(0)).params
  assert all(metrics['passes'] == 3 for _, metrics in found)
  moved = [
    jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, start)
    for state, _ in found
  ]
  assert_same(*moved, rtol=2e-2, atol=2e-2)
  assert_same(found[0][0].extra, found[1][0].extra, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (('widths.low=0',), r'low=0(\.0)?, high=1'),
    (('widths.step=0.2',), r'widths\.step=0\.2: a third'),
    (('widths.judged=1.5,',), r'widths\.judged=\[1\.5\]'),
    (('runs=us4l,',), 'us4l'),
    (('recipe.epochs=3',), r'recipe\.epochs=3: expected at least 4'),
    (('recipe.batch_size=1',), 'at least 2'),
    (('recipe.microbatches=2',), 'microbatches: expected 1'),
    (('recipe.optimizer.weight_decay=0.1',), 'group_decay: it takes the place'),
    (('momentum=2',), r'momentum=2'),
    (('final_momentum=3.0',), r'final_momentum=3\.0: expected a share'),
    (('heads.features=0',), r'heads\.features=0: expected at least 1'),
    (('heads.predictor=-2',), r'heads\.predictor=-2: expected at least 1'),
    (('group_decay.bins=0',), r'group_decay\.bins=0: expected at least 1 group'),
    (('group_decay.decay=-1.0',), r'group_decay\.decay=-1\.0: expected at least 0'),
    (('group_decay.alpha=0.2',), r'group_decay\.alpha=0\.2: expected 0 to .* = 0\.143'),
    (
      ('group_decay.kind=exp', 'group_decay.alpha=2.0'),
      r'group_decay\.alpha=2\.0: expected a factor',
    ),
    (('group_decay.warmup_epochs=-1',), r'group_decay\.warmup_epochs=-1: expected at least 0'),
    (('timed=-1',), r'timed=-1: expected a number of repeats'),
    (("model={'name': 'vgg11'}",), 'no slimmable network'),
  ],
)
def test_bad_settings_are_refused(changes, message):
  with pytest.raises(SettingsError, match=message):
    launcher.load_checked('us3l', 'embedded', [*TINY, *changes])


def test_a_run_judges_every_width_with_statistics_of_its_own(tmp_path):
  config = tiny_config(
    'data.train_size=1297', 'recipe.batch_size=256', 'data.test_options={"pastes": 1}', 'eval.k=5',
    'log_every=1', 'runs=us3l,',
  )  # fmt: skip
  launcher.check(config)
  found = us3l.run(config, tmp_path)
  assert [row['name'] for row in found['rows']] == ['untrained', 'US3L']
  metrics = found['rows'][1]['metrics']
  assert metrics['knn_1'] == metrics['foreign_knn_1']  # its own statistics
  assert metrics['probe_drop'] == metrics['probe_1'] - metrics['probe_0.5']
  assert metrics['knn_calibration'] == metrics['knn_0.5'] - metrics['foreign_knn_0.5']
  assert metrics['passes'] == 2.5 and metrics['compiled_widths'] == 4
  assert 'gigaflops' not in metrics  # of a step: not measured
  assert all(0 <= metrics[f'{kind}_0.5'] <= 100 for kind in ('knn', 'probe', 'foreign_knn'))
  assert (tmp_path / 'accuracy_over_width.png').stat().st_size > 1000
