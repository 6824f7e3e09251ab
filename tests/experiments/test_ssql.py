import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from golden_vectors import assert_close, golden

from experiments import ssql
from experiments.protocols import feature_evaluation, siamese
from experiments.protocols.siamese import Networks
from jaxlab import models, quantizers
from jaxlab.models import resnet
from jaxlab.training import TrainState

STATISTICS = {'running_mean': 'mean', 'running_var': 'var'}
TARGET_LAYERS = {'fc.0': 'fc.0', 'fc.1': 'fc.0.bn', 'fc.3': 'fc.3', 'fc.4': 'fc.3.bn'} | {
  'fc.6': 'fc.6',
  'fc.7': 'fc.6.bn',
}


def our_path(name: str) -> tuple[str, ...]:
  """Returns the path in our tree of an entry of the authors' online network or predictor."""
  module, leaf = name.rsplit('.', 1)
  parts = module.split('.')
  norm = parts[-1] == 'bn'
  parts = parts[:-1] if norm else parts
  if parts[0] == 'fc':
    path = ['projector', ('bn' if norm else 'fc') + str(int(parts[1]) // 3)]
  elif parts[0].isdigit():
    norm = parts[0] == '1'
    path = ['bn0' if norm else f'fc{int(parts[0]) // 3}']
  elif parts[0] == 'conv1':
    path = ['backbone', 'bn1' if norm else 'conv1']
  else:
    last = parts[2].replace('conv', 'bn') if norm else parts[2]
    last = f'downsample_{int(norm)}' if parts[2] == 'downsample' else last
    path = ['backbone', f'{parts[0]}_{parts[1]}', last]
  if leaf in STATISTICS:
    return (*path, STATISTICS[leaf])
  return (*path, leaf if leaf == 'bias' else 'scale' if norm else 'kernel')


def target_name(name: str) -> str:
  """Returns the online network's name of an entry of the momentum network."""
  module, leaf = name.rsplit('.', 1)
  parts = module.split('.')
  if parts[0] == 'fc':
    return f'{TARGET_LAYERS[module]}.{leaf}'
  if parts[-1].startswith('bn'):
    return '.'.join([*parts[:-1], f'conv{parts[-1][2:]}', 'bn', leaf])
  if 'downsample' in parts:
    return '.'.join([*parts[:-1], *(['bn'] if parts[-1] == '1' else []), leaf])
  return name


def to_tree(arrays: dict, dtype, rename=lambda name: name) -> dict:
  flat = {}
  for name, array in arrays.items():
    order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    flat[our_path(rename(name))] = jnp.asarray(
      array if order is None else array.transpose(order), dtype
    )
  tree = {'params': {}, 'batch_stats': {}}
  for path, array in flat.items():
    tree['batch_stats' if path[-1] in ('mean', 'var') else 'params'][path] = array
  return {key: traverse_util.unflatten_dict(value) for key, value in tree.items()}


def tiny_networks(online: dict, predictor: dict) -> Networks:
  """Returns networks of the file's sizes: two stages of one block, the authors' heads."""
  flat = traverse_util.flatten_dict(online['params'], sep='/')
  stages = [
    path for path in flat if path.startswith('backbone/layer') and path.endswith('conv2/kernel')
  ]
  widths = tuple(flat[path].shape[-1] for path in sorted(stages))
  backbone = models.ResNet(
    stage_sizes=(1,) * len(widths),
    width=flat['backbone/conv1/kernel'].shape[-1],
    widths=widths,
    stem='cifar',
  )
  hidden, features = flat['projector/fc2/kernel'].shape
  encoder = models.Encoder(backbone, models.simsiam_projector(hidden, features))
  predictor_hidden = predictor['params']['fc0']['kernel'].shape[-1]
  return Networks(encoder, models.simsiam_predictor(predictor_hidden, features))


def check_tree(actual: dict, expected: dict, rtol: float, atol: float) -> None:
  actual, expected = (traverse_util.flatten_dict(tree, sep='/') for tree in (actual, expected))
  for path, value in expected.items():
    assert_close(actual[path], value, rtol, atol)
  assert expected


@golden('ssql', 'ssql_simsiam_step')
@pytest.mark.parametrize('x64', [True, False])
def test_simsiam_step_agrees_with_official_code(vectors, x64, monkeypatch):
  check_step(vectors, x64, None, monkeypatch)


@golden('ssql', 'ssql_byol_step')
def test_byol_step_agrees_with_official_code(vectors, monkeypatch):
  check_step(vectors, True, 0.99, monkeypatch)


def check_step(vectors, x64, momentum, monkeypatch):
  dtype, rtol, atol = (jnp.float64, 1e-9, 1e-9) if x64 else (jnp.float32, 1e-4, 1e-6)
  if x64:  # LLVM takes half a minute for a CPU's own forms of these convolutions in float64
    monkeypatch.setattr(resnet, 'conv_general_dilated', jax.lax.conv_general_dilated)
  with jax.enable_x64(x64):
    online = to_tree(vectors.tree('init_online.'), dtype)
    predictor = to_tree(vectors.tree('init_predictor.'), dtype)
    nets = tiny_networks(online, predictor)
    params = {'encoder': online['params'], 'predictor': predictor['params']}
    stats = {'encoder': online['batch_stats'], 'predictor': predictor['batch_stats']}
    views = [jnp.asarray(vectors[f'in_view{i}'].transpose(0, 2, 3, 1), dtype) for i in (1, 2)]
    bits = (vectors.param('weight_bits'), vectors.param('act_bits'))

    targets = None
    if momentum is not None:
      target = to_tree(vectors.tree('init_target.'), dtype, target_name)
      state = TrainState(jnp.int32(1), params, {}, {}, {'target': target})
      extra = siamese.follow(momentum)(state).extra  # behind the step before
      targets, extra = jax.jit(siamese.target_pass, static_argnums=0)(nets.encoder, extra, views)
      moved = extra['target']
      for i in (0, 1):
        assert_close(targets[i], vectors[f'out_z{i + 1}'], rtol)
      after = to_tree(vectors.tree('after_target.'), dtype, target_name)
      check_tree(moved['params'], after['params'], rtol, atol)
      check_tree(moved['batch_stats'], after['batch_stats'], rtol, atol)

    passes, online_pass = [], ssql.online_pass
    monkeypatch.setattr(
      ssql, 'online_pass', lambda *args: passes.append(online_pass(*args)) or passes[-1]
    )

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def everything(params):
      passes.clear()
      options = {'variant': 'ssql', 'targets': targets}
      loss, left = ssql.objective(nets, params, stats, views, bits, **options)
      return loss, (left, tuple(passes))

    (loss, ((new_stats, _), (in_float, quantized))), gradient = everything(params)
    assert_close(loss, vectors['out_loss'], rtol)
    for name in ('online', 'predictor'):
      ours = 'encoder' if name == 'online' else name
      expected = to_tree(vectors.tree(f'grad_{name}.'), dtype)
      check_tree(gradient[ours], expected['params'], rtol, atol)
      expected = to_tree(vectors.tree(f'after_{name}.'), dtype)
      check_tree(new_stats[ours], expected['batch_stats'], rtol, atol)
    frozen = gradient['encoder']['projector']['fc2']['bias']
    np.testing.assert_array_equal(frozen, np.zeros_like(frozen))
    for i in (0, 1):
      assert_close(in_float.predictions[i], vectors[f'out_p{i + 1}'], rtol)
      assert_close(quantized.predictions[i], vectors[f'out_p{i + 1}_quant'], rtol)
      if momentum is None:
        assert_close(in_float.projections[i], vectors[f'out_z{i + 1}'], rtol)
    check_activation_parameters(in_float.collections['ranges'], vectors, rtol)


def check_activation_parameters(ranges, vectors, rtol):
  from jaxlab import quantizers

  flat = traverse_util.flatten_dict(ranges, sep='/')
  recorded = {path.rpartition('/')[0] for path in flat}
  seen = set()
  for name, scale in vectors.tree('act_scale_').items():
    block, _, conv = name.partition('.conv')
    path = 'backbone/relu' if name == 'conv1' else 'backbone/' + block.replace('.', '_')
    path += '' if name == 'conv1' else f'/relu{conv or 2}'
    bits = 8 if name == 'conv1' else vectors.param('act_bits')
    params = quantizers.params_from_range(
      quantizers.AffineQuantizer(bits, 'asymmetric'),
      flat[f'{path}/minimum'],
      flat[f'{path}/maximum'],
    )
    assert_close(params.scale.squeeze(), scale, rtol)
    assert_close(params.zero_point.squeeze(), vectors[f'act_zero_point_{name}'], rtol)
    seen.add(path)
  assert recorded == seen


@pytest.mark.exhaustive
def test_evaluation_leaves_a_tensor_with_a_dead_channel_in_float_as_training_does():
  """Kernels with a channel of zeros, and a channel of outputs that is constant: a scale of 0."""
  model = models.create('cifar_resnet20', stage_sizes=(1, 1, 1), num_classes=None)
  x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
  variables = jax.jit(model.init)(jax.random.key(1), x)
  rules = [quantizers.Rule('.*', 'kernel', 2)]
  alive = feature_evaluation.apply_quantized(model, variables, {}, x, rules)
  kernels = traverse_util.flatten_dict(variables['params'])
  dead = {p: k.at[..., 0].set(0) if p[-1] == 'kernel' else k for p, k in kernels.items()}
  variables = {**variables, 'params': traverse_util.unflatten_dict(dead)}
  found = feature_evaluation.apply_quantized(model, variables, {}, x, rules)
  np.testing.assert_allclose(found, jax.jit(model.apply)(variables, x), rtol=1e-5, atol=1e-6)
  assert not np.allclose(found, alive, atol=1e-3)
