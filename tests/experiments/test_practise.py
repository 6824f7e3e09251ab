import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from golden_vectors import assert_close, golden
from torch_resnets import batches, kernel, network, renumbered, variables

from experiments import practise
from experiments.harness import launcher
from experiments.harness.networks import Loaded
from experiments.harness.settings import SettingsError
from experiments.protocols import block_recovery, few_shot_compression
from jaxlab import compression, models

DATA = "{'name': 'digits', 'train_options': {'test_size': 1597}, 'test_options': {'test_size': 100}, 'train_size': 200}"  # noqa: E501


def tiny(*changes):
  """Returns the settings of a narrow ResNet of two stages and few images."""
  return launcher.load('practise', 'embedded', [
    f'network.data={DATA}', 'network.model.stage_sizes=(3, 1)', 'network.model.width=4',
    'network.recipe.epochs=1', 'network.recipe.batch_size=32', 'network.augment.kind=none',
    'augment.kind=none', 'totals=10', 'counts=1', 'tuning.steps=2', 'tuning.batch_size=8',
    'recovery.steps=2', 'recovery.batch_size=8', 'eval_batch_size=64', 'claims=()', *changes,
  ])  # fmt: skip


def of_vectors(vectors):
  """Returns the settings of a reference file's network and loop."""
  whole = network(vectors.tree('param_origin_'))
  images = batches(vectors, 'images_nchw')[0]
  model = {
    'name': 'cifar_resnet18', 'num_classes': whole.num_classes, 'width': whole.width,
    **{name: tuple(getattr(whole, name)) for name in ('stage_sizes', 'widths', 'strides')},
  }  # fmt: skip
  own = {
    'name': 'digits', 'num_classes': whole.num_classes, 'stored_image': images.shape[1:],
    'dtype': 'float32', 'mean': 0.0, 'std': 1.0, 'train_size': 100,
  }  # fmt: skip
  optimizer = {
    'name': 'sgd', 'momentum': vectors.param('momentum'), 'weight_decay': vectors.param('weight_decay')
  }  # fmt: skip
  steps = {'steps': vectors.param('num_steps'), 'rate': vectors.param('lr'), 'optimizer': optimizer}
  return launcher.load('practise', 'embedded', {
    'network.model': model, 'network.data': own, 'augment': {'kind': 'none'}, 'recovery': steps,
    'totals': (len(images),),
  })  # fmt: skip


@golden('practise', 'recover_')
def test_recovering_a_block_agrees_with_official_code_to_the_last_adaptor(vectors):
  config = of_vectors(vectors)
  stage, gone = vectors.param('drop_stage'), vectors.param('drop_block')
  block = f'layer{stage}_{gone}'
  blocks = practise.stages(config)[f'layer{stage}']
  place = blocks.index(block)
  whole = variables(vectors.tree('param_origin_'))
  images = [own.astype(np.float32) for own in batches(vectors, 'images_nchw')]
  run, own = block_recovery.recovery(config, blocks), block_recovery.Recovery(config, blocks)
  errors = jax.jit(lambda adaptors, x: jnp.mean(own.errors(adaptors, whole, x)[place]))

  def metric(adaptors):
    return np.mean([errors(adaptors, x) for x in images])

  state = run.program.init(jax.random.key(0))
  assert_close(metric(state.params), vectors['out_metric_before'], 2e-6)
  step, found = jax.jit(run.program.step), []
  for index in range(run.num_steps):
    x = images[index % len(images)]
    numbers = np.arange(len(x), dtype=np.int32)
    batch = {'image': x, 'label': np.zeros_like(numbers), 'index': numbers}
    state, metrics = step(state, {'whole': whole}, batch)
    found.append(metrics[block])
  assert_close(found, vectors['out_losses'], 2e-6)
  assert_close(metric(state.params), vectors['out_metric_after'], 2e-6)

  # Adaptors by the paths of the network without the block.
  trained = traverse_util.flatten_dict(
    jax.tree.map(lambda leaf: leaf[place], state.params), sep='/'
  )
  has = traverse_util.flatten_dict(own.trained(state.params), sep='/')
  trained = {path: leaf for path, leaf in trained.items() if has[path][place].item()}
  expected = {}
  for kind, side in (('pre', 'before'), ('after', 'after')):
    for name, array in vectors.tree(f'out_adaptor_{kind}_').items():
      _, number, *layer = name.split('_')
      path = f'{name[: len("layer1")]}_{number}/{"_".join(layer)}'
      expected[f'{renumbered(path, stage, [gone])}/{side}'] = array[:, :, 0, 0]
  assert set(trained) == set(expected)
  for path, array in expected.items():
    assert_close(trained[path], array, 0, 5e-7)

  # The network without the block, with adaptors as layers, and with folded ones.
  adaptors = traverse_util.unflatten_dict(trained, sep='/')
  model, plan = few_shot_compression.whole_network(config), practise.dropping(config, [block])
  masked, hooks = compression.masked(model, whole, compression.masks(model, plan))
  hooks = [*compression.adaptor_hooks(adaptors), *hooks]
  logits = jax.jit(lambda v: models.apply(model, v, images[0], hooks=hooks))(
    {**masked, 'adaptors': adaptors}
  )
  assert_close(logits, vectors['out_logits_with_adaptors'], 2e-6)
  folded = {**whole, 'params': compression.fold_adaptors(whole['params'], adaptors)}
  small, given = compression.slice_network(model, folded, plan)
  assert_close(jax.jit(small.apply)(given, images[0]), vectors['out_logits_folded'], 2e-6)
  for name, array in vectors.tree('out_folded_weight_').items():
    _, number, *layer = name.split('_')
    leaf = given['params'][f'{name[: len("layer1")]}_{number}']['_'.join(layer)]['kernel']
    assert_close(leaf, kernel(array), 0, 1e-6)


@pytest.mark.exhaustive
def test_gaps_do_not_touch_each_other():
  config = tiny()
  ((_, blocks),) = practise.stages(config).items()
  x = {'image': np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)}
  x |= {'label': np.zeros(8, np.int32), 'index': np.arange(8, dtype=np.int32)}
  whole = jax.jit(few_shot_compression.whole_network(config).init)(
    jax.random.key(1), jnp.zeros((1, 8, 8, 1))
  )
  alone = {}
  for own in (blocks, *((block,) for block in blocks)):
    run = block_recovery.recovery(config, own)
    state, metrics = jax.jit(run.program.step)(
      run.program.init(jax.random.key(0)), {'whole': dict(whole)}, x
    )
    for place, block in enumerate(own):
      leaves = traverse_util.flatten_dict(jax.tree.map(lambda a: a[place], state.params), sep='/')  # noqa: B023
      alone.setdefault(block, []).append((metrics[block], leaves))
  for together, single in alone.values():
    np.testing.assert_allclose(together[0], single[0], rtol=1e-5)
    for path, leaf in single[1].items():
      np.testing.assert_allclose(together[1][path], leaf, atol=1e-6)


def test_a_run_scores_blocks_drops_some_and_compares(tmp_path):
  found = launcher.launch(tiny('runs=practise,untuned,filters'), tmp_path)
  rows = {item['name']: item['metrics'] for item in found['rows']}
  assert list(rows) == [
    'whole', 'any order', 'recoverability', 'error without adaptors', 'PRACTISE',
    'PRACTISE, not tuned', 'filters, mimicking',
  ]  # fmt: skip
  import json

  blocks = json.loads((tmp_path / 'blocks.json').read_text())
  assert list(blocks) == ['layer1_1', 'layer1_2']
  for own in blocks.values():
    assert own['score'] == pytest.approx(own['recoverability'] / own['macs'])
  assert rows['filters, mimicking']['macs_1'] <= rows['PRACTISE']['macs_1'] < 100
  assert rows['PRACTISE']['macs_1'] == rows['PRACTISE, not tuned']['macs_1']
  assert {path.name for path in tmp_path.glob('*.png')} == {'blocks.png', 'accuracy_over_cost.png'}


def test_the_cheapest_and_the_dearest_blocks_are_dropped():
  config = launcher.load('practise', 'embedded', ['counts=2', 'runs=practise,worst,random,labels'])
  scores = {
    block: float(own)
    for block, own in zip(practise.candidates(config), (5, 1, 9, 2, 7, 3, 8, 4, 6))
  }
  found = practise.plans(config, 2, scores)
  assert found['practise'].drop == found['labels'].drop == ('layer1_2', 'layer2_1')
  assert found['worst'].drop == ('layer1_3', 'layer3_1') and len(found['random'].drop) == 2


def test_adaptors_that_diverge_are_named(tmp_path, monkeypatch):
  def diverge(*args, **kwargs):
    raise FloatingPointError('The loss is nan at step 1, with layer1_2.')

  monkeypatch.setattr(practise.runs, 'train', diverge)
  config = tiny()
  nets = untrained(config)
  with pytest.raises(
    FloatingPointError, match=r'adaptors of layer1, .* step 1, with layer1_2. Take a lower'
  ):
    practise.score(config, nets, None, tmp_path)


def untrained(config):
  """Returns a network as it is drawn."""
  model = few_shot_compression.whole_network(config)
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  return Loaded(config, config.network, model, dict(variables), None, None)


def timed(monkeypatch, *times):
  """Lets each block leave these shares of the latency, in percent."""

  def costs(config, found, base):
    left = dict(zip(found, (100.0, *times), strict=True))
    return {name: {'macs': 90.0, 'latency': own} for name, own in left.items()}

  monkeypatch.setattr(few_shot_compression, 'costs', costs)


def test_what_blocks_save_is_measured_once(tmp_path, monkeypatch):
  config = tiny('price=latency', 'timed=3')
  nets = untrained(config)
  timed(monkeypatch, 90.0, 75.0)
  first = practise.savings(config, nets, tmp_path)
  assert {name: own['latency'] for name, own in first.items()} == pytest.approx(
    {'layer1_1': 0.1, 'layer1_2': 0.25}
  )
  timed(monkeypatch, 75.0, 90.0)
  assert practise.savings(config, nets, tmp_path) == first
  other = tiny('price=latency', 'timed=4')
  with pytest.raises(ValueError, match=r'savings.json holds .*Choose another work directory'):
    practise.savings(other, nets, tmp_path)
  # Where they decide nothing, times are taken anew.
  found = practise.savings(tiny('price=macs', 'timed=4'), nets, tmp_path)
  assert found['layer1_1']['latency'] == pytest.approx(0.25)


def test_a_block_that_saves_nothing_ends_a_run_before_any_training(tmp_path, monkeypatch):
  config = tiny('price=latency', 'timed=3')
  nets = untrained(config)
  timed(monkeypatch, 90.0, 101.0)
  monkeypatch.setattr(practise.runs, 'train', lambda *args, **kwargs: pytest.fail('training'))
  with pytest.raises(ValueError, match=r'saved by layer1_2 \(-0.01\)'):
    practise.score(config, nets, None, tmp_path)
  timed(monkeypatch, 90.0, 99.0)  # measured again, nothing was written
  assert practise.savings(config, nets, tmp_path)['layer1_2']['latency'] == pytest.approx(0.01)


@pytest.mark.exhaustive
def test_filters_save_as_much_and_hardly_more():
  config = tiny('counts=1')
  whole = few_shot_compression.whole_network(config)
  drawn = jax.jit(whole.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  plan = practise.equal_filters(config, drawn, ['layer1_1'])

  def macs(plan):
    small = few_shot_compression.small_network(config, plan)
    return few_shot_compression.multiply_accumulates(config, small)

  target = macs(practise.dropping(config, ['layer1_1']))
  size = len(plan.keep['layer1_1/conv1'])
  more = compression.plan(whole, {name: range(size + 1) for name in plan.keep})
  assert macs(plan) <= target < macs(more)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('counts=[]', r'counts=\(\): expected numbers from 1 to 2'),
    ('counts=3', r'counts=\(3,\): expected numbers from 1 to 2'),
    ('network.model.stage_sizes=(1, 1)', 'network.model: .*no block can be dropped'),
    ('price=latency', "price='latency' needs timed"),
    ('origin=noise', "'labels' needs labels"),
    ('recovery.steps=0', 'recovery.steps=0'),
    ('recovery.batch_size=7', 'recovery: a batch of 7 of 10 images'),
    ('runs=[]', 'runs is empty'),
    ('label_rate=0', 'label_rate=0.0'),
    ('last_conv=last', 'last_conv'),
  ],
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny(change))
