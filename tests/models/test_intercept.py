import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from golden_vectors import assert_close
from models.random_variables import random_images, random_variables

from jaxlab.models import (
  Hook,
  ResNet,
  ViT,
  apply,
  capture,
  eval_mode_hooks,
  map_matching,
  module_paths,
)

VIT = {'patch_size': 4, 'image_size': 8, 'width': 8, 'depth': 2, 'num_heads': 2, 'num_classes': 3}
RESNET = {'stage_sizes': (2,), 'width': 4, 'widths': (4,), 'stem': 'cifar', 'num_classes': 3}


class Net(nn.Module):
  """`dense1(relu(dense0(x)))` with two named layers: small enough to compute by hand."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(2, name='dense1')(nn.relu(nn.Dense(4, name='dense0')(x)))


@pytest.fixture
def net():
  x = random_images((5, 3))
  return Net(), random_variables(Net(), x), x


def by_hand(params, x, before=lambda x: x, between=lambda h: h):
  h = before(x) @ params['dense0']['kernel'] + params['dense0']['bias']
  return between(np.maximum(h, 0)) @ params['dense1']['kernel'] + params['dense1']['bias']


def test_input_output_and_call_hooks_change_what_flows(net):
  model, variables, x = net
  params = variables['params']
  y = apply(model, variables, x, hooks=[Hook('dense0', input=lambda site, x: 2 * x)])
  assert_close(y, by_hand(params, x, before=lambda x: 2 * x), 1e-6)
  y = apply(model, variables, x, hooks=[Hook('dense1', output=lambda site, y: y + 1)])
  assert_close(y, by_hand(params, x) + 1, 1e-6)
  hook = Hook('dense1', call=lambda site, call, h: call(h) + h[:, :2])
  h = np.maximum(x @ params['dense0']['kernel'] + params['dense0']['bias'], 0)
  assert_close(apply(model, variables, x, hooks=[hook]), by_hand(params, x) + h[:, :2], 1e-6)
  y = apply(model, variables, x, hooks=[Hook('', output=lambda site, y: -y)])
  assert_close(y, -by_hand(params, x), 1e-6)
  assert_close(apply(model, variables, x), by_hand(params, x), 1e-6)  # nothing lingers


def test_first_hook_is_the_innermost(net):
  model, variables, x = net
  hooks = [
    Hook('dense1', output=lambda site, y: y + 1),
    Hook('dense1', output=lambda site, y: 10 * y),
  ]
  assert_close(
    apply(model, variables, x, hooks=hooks), 10 * (by_hand(variables['params'], x) + 1), 1e-6
  )
  hooks = [
    Hook('dense0', input=lambda site, x: x + 1),
    Hook('dense0', input=lambda site, x: 10 * x),
  ]
  expected = by_hand(variables['params'], x, before=lambda x: 10 * x + 1)
  assert_close(apply(model, variables, x, hooks=hooks), expected, 1e-6)


def test_patterns_match_whole_paths(net):
  model, variables, x = net
  with pytest.raises(ValueError, match=r"hook pattern 'dense'\. .*dense0"):
    apply(model, variables, x, hooks=[Hook('dense', output=lambda site, y: y)])
  seen = []
  apply(model, variables, x, hooks=[Hook(r'dense\d', output=lambda s, y: seen.append(s.path) or y)])
  assert seen == ['dense0', 'dense1']


@pytest.mark.parametrize('jit', [False, True])
def test_patterns_that_match_nothing_raise_with_the_closest_paths(net, jit):
  model, variables, x = net
  hooks = [Hook('dense0', output=lambda s, y: y), Hook('dense_1', output=lambda s, y: y)]

  def run(variables, x):
    return apply(model, variables, x, hooks=hooks)

  with pytest.raises(ValueError, match=r"'dense_1'\. Closest of the 2 paths: dense1"):
    (jax.jit(run) if jit else run)(variables, x)
  with pytest.raises(ValueError, match='No module matches'):
    capture(model, variables, ['layer7/.*'], x)


def test_errors_of_the_model_are_not_hidden_by_unmatched_patterns(net):
  model, variables, x = net

  def broken(site, y):
    raise KeyError('mine')

  with pytest.raises(KeyError, match='mine'):
    apply(model, variables, x, hooks=[Hook('dense0', output=broken), Hook('no', output=broken)])


def test_malformed_hooks_raise():
  with pytest.raises(ValueError, match='exactly one of'):
    Hook('a')
  with pytest.raises(ValueError, match=r"exactly one of .*\['input', 'output'\]"):
    Hook('a', input=lambda s, x: x, output=lambda s, x: x)
  with pytest.raises(ValueError, match='no regular expression'):
    Hook('a(', input=lambda s, x: x)


def scale_by_site(site, y):
  return y * site.read('scale')


def test_gradient_reaches_site_arrays_and_missing_ones_raise(net):
  model, variables, x = net
  hooks = [Hook('dense1', output=scale_by_site)]

  def loss(arrays):
    return jnp.sum(apply(model, {**variables, 'hooks': arrays}, x, hooks=hooks) ** 2)

  arrays = {'dense1': {'scale': jnp.float32(1.5)}}
  value, gradient = jax.jit(jax.value_and_grad(loss))(arrays)
  assert_close(gradient['dense1']['scale'], 2 * value / 1.5, 1e-5)
  with pytest.raises(ValueError, match="'dense1' has no 'scale' in collection 'hooks'"):
    loss({})


def test_written_arrays_come_back_only_if_asked_for(net):
  model, variables, x = net

  def record(site, y):
    site.write('max', jnp.maximum(y.max(), site.read('max')) if site.has('max') else y.max())
    return y

  hooks = [Hook(r'dense\d', output=record, collection='ranges')]
  y, state = apply(model, variables, x, hooks=hooks, mutable=['ranges'])
  assert_close(state['ranges']['dense1']['max'], y.max(), 1e-7)
  second, wider = apply(model, {**variables, **state}, 9 * x, hooks=hooks, mutable=['ranges'])
  assert_close(wider['ranges']['dense1']['max'], max(y.max(), second.max()), 1e-7)
  assert_close(apply(model, variables, x, hooks=hooks), y, 1e-7)


def test_vmap_over_site_arrays_equals_a_loop(net):
  model, variables, x = net
  hooks = [Hook('dense0', output=scale_by_site)]

  def run(scale):
    return apply(model, {**variables, 'hooks': {'dense0': {'scale': scale}}}, x, hooks=hooks)

  scales = jnp.asarray([0.5, 1.0, 3.0])
  assert_close(jax.vmap(run)(scales), jnp.stack([run(scale) for scale in scales]), 1e-6)


def test_block_is_dropped_by_returning_its_input():
  model, smaller = ResNet(**RESNET), ResNet(**{**RESNET, 'stage_sizes': (1,)})
  x = random_images((2, 6, 6, 3))
  variables = random_variables(model, x)
  hooks = [Hook('layer1_1', call=lambda site, call, *args: args[0])]
  y = jax.jit(lambda v: apply(model, v, x, hooks=hooks))(variables)
  rest = {c: {n: t for n, t in tree.items() if n != 'layer1_1'} for c, tree in variables.items()}
  assert_close(y, jax.jit(smaller.apply)(rest, x), 1e-6)


def test_capture_returns_outputs_by_path_and_keeps_other_state():
  model = ResNet(**RESNET)
  x = random_images((2, 6, 6, 3))
  variables = random_variables(model, x)
  patterns = [r'layer1_\d/relu2', 'avgpool']
  run = jax.jit(lambda v: capture(model, v, patterns, x, True, mutable='batch_stats'))
  (y, state), captured = run(variables)
  assert set(captured) == {'layer1_0/relu2', 'layer1_1/relu2', 'avgpool'}
  assert set(state) == {'batch_stats'}
  assert_close(captured['avgpool'], captured['layer1_1/relu2'].mean((1, 2)), 1e-6)
  fc = variables['params']['fc']
  assert_close(y, captured['avgpool'] @ fc['kernel'] + fc['bias'], 1e-5)


def test_what_is_captured_has_passed_all_hooks(net):
  """Capturing is outermost: the value is what the module hands on, whatever the hooks and their order."""
  model, variables, x = net
  params = variables['params']
  plus, times = (
    Hook('dense0', output=lambda site, y: y + 1),
    Hook('dense0', output=lambda site, y: 10 * y),
  )
  _, captured = capture(model, variables, ['dense0', 'dense1'], x, hooks=[plus, times])
  raw = x @ params['dense0']['kernel'] + params['dense0']['bias']
  assert_close(captured['dense0'], 10 * (raw + 1), 1e-6)
  y, captured = capture(model, variables, ['dense0', 'dense1'], x, hooks=[times, plus])
  assert_close(captured['dense0'], 10 * raw + 1, 1e-6)
  h = np.maximum(10 * raw + 1, 0)
  expected = h @ params['dense1']['kernel'] + params['dense1']['bias']
  assert_close(captured['dense1'], expected, 1e-6)
  assert_close(y, captured['dense1'], 1e-7)
  hooks = [Hook('dense1', input=lambda site, h: 0 * h)]
  y, captured = capture(model, variables, ['dense1'], x, hooks=hooks)
  assert_close(captured['dense1'], np.broadcast_to(params['dense1']['bias'], (5, 2)), 1e-7)


def test_capture_under_hooks_is_jitted_differentiated_and_gives_back_what_they_write(net):
  model, variables, x = net
  hooks = [
    Hook('dense0', output=scale_by_site),
    Hook('dense0', output=record_sum, collection='seen'),
  ]

  def loss(arrays, params):
    given = {'params': params, 'hooks': arrays}
    (y, state), captured = capture(model, given, ['dense0'], x, hooks=hooks, mutable=['seen'])
    return jnp.sum(captured['dense0'] ** 2) + 0 * jnp.sum(y), (captured, state)

  arrays = {'dense0': {'scale': jnp.float32(1.5)}}
  run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  (value, (captured, state)), (by_scale, by_params) = jax.jit(run)(arrays, variables['params'])
  kernel, bias = variables['params']['dense0']['kernel'], variables['params']['dense0']['bias']
  scaled = 1.5 * (x @ kernel + bias)
  assert_close(captured['dense0'], scaled, 1e-6)
  assert set(state) == {'seen'}
  assert_close(state['seen']['dense0']['sum'], scaled.sum(), 1e-4, 1e-4)
  assert_close(by_scale['dense0']['scale'], 2 * np.sum(scaled**2) / 1.5, 1e-5)
  assert_close(by_params['dense0']['kernel'], 2 * 1.5 * x.T @ scaled, 1e-5)
  np.testing.assert_array_equal(by_params['dense1']['kernel'], 0)
  (eager, _), _ = run(arrays, variables['params'])
  assert_close(eager, value, 1e-6)


def test_modules_in_a_dropped_block_are_not_captured():
  model = ResNet(**RESNET)
  x = random_images((2, 6, 6, 3))
  variables = random_variables(model, x)
  hooks = [Hook('layer1_1', call=lambda site, call, *args: args[0])]
  run = lambda patterns: capture(model, variables, patterns, x, hooks=hooks)  # noqa: E731
  _, captured = run([r'layer1_\d'])
  np.testing.assert_array_equal(captured['layer1_1'], captured['layer1_0'])
  with pytest.raises(ValueError, match=r"'layer1_1/conv1'\. Closest .*layer1_0/conv1"):
    run(['layer1_1/conv1'])
  with pytest.raises(ValueError, match="hook pattern 'layer9'"):
    capture(model, variables, ['fc'], x, hooks=[Hook('layer9', output=lambda s, y: y)])
  with pytest.raises(ValueError, match=r"patterns is a list .* got the string 'avgpool'"):
    run('avgpool')


class Output(nn.Module):
  @nn.compact
  def __call__(self, x):
    return {'x': x, 'more': (x + 1, None)}


class Structured(nn.Module):
  @nn.compact
  def __call__(self, x):
    found = Output(name='output')(x)
    return nn.Dense(2, name='dense')(found['x'] + found['more'][0])


def test_structures_are_captured_as_they_are_returned():
  x = random_images((3, 4))
  model = Structured()
  variables = random_variables(model, x)
  y, captured = jax.jit(lambda v: capture(model, v, ['output', ''], x))(variables)
  assert jax.tree.structure(captured['output']) == jax.tree.structure({'x': 0, 'more': (0, None)})
  assert_close(captured['output']['more'][0], x + 1, 1e-7)
  np.testing.assert_array_equal(captured[''], y)


@pytest.mark.parametrize(
  ('mutable', 'names'), [('batch_stats', {'batch_stats'}), (True, {'batch_stats', 'params'})]
)
def test_capture_passes_on_what_is_mutable(mutable, names):
  model, x = ResNet(**RESNET), random_images((2, 6, 6, 3))
  variables = random_variables(model, x)
  run = jax.jit(lambda v: capture(model, v, ['avgpool'], x, True, mutable=mutable))
  (_, state), captured = run(variables)
  assert set(state) == names and set(captured) == {'avgpool'}
  y, _ = jax.jit(lambda v: capture(model, v, ['avgpool'], x, mutable=False))(variables)
  assert y.shape == (2, 3)


def pairs(model, x, hooks):
  """Jitted value, gradient of the site arrays and of the parameters, and what the hooks wrote."""

  def loss(arrays, params):
    y, state = apply(model, {'params': params, 'hooks': arrays}, x, hooks=hooks, mutable=['seen'])
    return jnp.sum(jnp.sin(y)), state

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def record_sum(site, y):
  site.write('sum', y.sum())
  return y


@pytest.mark.parametrize('remat', [False, True])
def test_hooks_read_write_and_differentiate_under_remat_and_scan(remat):
  x = random_images((2, 8, 8, 3))
  hooks = [
    Hook(r'blocks\w*/mlp/gelu', output=scale_by_site),
    Hook(r'blocks\w*/mlp/fc2', output=record_sum, collection='seen'),
  ]
  plain, scanned = ViT(**VIT, remat=remat), ViT(**VIT, remat=remat, scan=True)
  variables = random_variables(scanned, x)
  blocks = {
    f'blocks_{i}': jax.tree.map(lambda a, i=i: a[i], variables['params']['blocks']) for i in (0, 1)
  }
  params = {**{k: v for k, v in variables['params'].items() if k != 'blocks'}, **blocks}
  scales = np.asarray([0.5, 2.0], np.float32)
  site = lambda scale: {'mlp': {'gelu': {'scale': scale}}}  # noqa: E731
  arrays = {f'blocks_{i}': site(scales[i]) for i in (0, 1)}

  (value, seen), (grad, param_grad) = pairs(plain, x, hooks)(arrays, params)
  (scan_value, scan_seen), (scan_grad, scan_param_grad) = pairs(scanned, x, hooks)(
    {'blocks': site(scales)}, variables['params']
  )
  assert_close(scan_value, value, 1e-5)
  stacked = scan_seen['seen']['blocks']['mlp']['fc2']['sum']
  assert stacked.shape == (2,)
  for i in (0, 1):
    assert_close(stacked[i], seen['seen'][f'blocks_{i}']['mlp']['fc2']['sum'], 1e-4)
    own = grad[f'blocks_{i}']['mlp']['gelu']['scale']
    assert float(jnp.abs(own)) > 1e-4
    assert_close(scan_grad['blocks']['mlp']['gelu']['scale'][i], own, 1e-3)
    kernel = param_grad[f'blocks_{i}']['mlp']['fc1']['kernel']
    assert_close(scan_param_grad['blocks']['mlp']['fc1']['kernel'][i], kernel, 1e-4)


def test_captured_blocks_of_a_scan_are_stacked():
  x = random_images((2, 8, 8, 3))
  model = ViT(**VIT, scan=True)
  variables = random_variables(model, x)
  _, captured = jax.jit(lambda v: capture(model, v, ['blocks', 'blocks/attention/softmax'], x))(
    variables
  )
  assert captured['blocks'].shape == (2, 2, 5, 8)
  assert captured['blocks/attention/softmax'].shape == (2, 2, 2, 5, 5)


def test_module_paths_trace_without_values():
  images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  paths = module_paths(ViT(**VIT), images)
  assert paths[0] == 'patch_embed' and 'blocks_1/mlp/gelu' in paths and paths[-1] == 'head'
  assert '' not in paths


def test_map_matching_changes_the_matching_leaves_alone(net):
  _, variables, _ = net
  params = variables['params']
  seen = []
  new = map_matching(lambda path, leaf: seen.append(path) or leaf * 0, params, r'.*/kernel')
  assert sorted(seen) == ['dense0/kernel', 'dense1/kernel']
  np.testing.assert_array_equal(new['dense0']['kernel'], 0)
  np.testing.assert_array_equal(new['dense1']['bias'], params['dense1']['bias'])
  assert float(jnp.abs(params['dense0']['kernel']).max()) > 0
  gradient = jax.grad(
    lambda p: jnp.sum(map_matching(lambda _, w: 3 * w, p, 'dense0/bias')['dense0']['bias'])
  )
  np.testing.assert_array_equal(gradient(params)['dense0']['bias'], 3)
  with pytest.raises(ValueError, match=r"No parameter matches pattern 'dense/kernel'\. Closest"):
    map_matching(lambda path, leaf: leaf, params, 'dense/kernel')


@pytest.mark.parametrize('by_name', [True, False])
def test_modules_in_eval_mode_keep_their_statistics(by_name):
  model, images = ResNet(**RESNET), random_images((4, 8, 8, 3))
  variables = random_variables(model, images)
  hooks = eval_mode_hooks(['layer1_0'])
  given = {'train': True} if by_name else {}
  args = (images,) if by_name else (images, True)
  y, changed = apply(model, variables, *args, hooks=hooks, mutable=['batch_stats'], **given)
  old, new = variables['batch_stats'], changed['batch_stats']
  for path in ('layer1_0', 'layer1_1'):
    same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (old[path], new[path])))]
    assert all(same) if path == 'layer1_0' else not any(same)
  trained, _ = apply(model, variables, images, True, mutable=['batch_stats'])
  assert not np.allclose(y, trained)
  assert_close(apply(model, variables, images, hooks=hooks), apply(model, variables, images), 1e-6)
  with pytest.raises(ValueError, match='layer9'):
    apply(
      model, variables, images, True, hooks=eval_mode_hooks(['layer9']), mutable=['batch_stats']
    )


def test_hooks_find_the_first_argument_by_position_or_name():
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, aside=None):
      return nn.Dense(2, name='fc')(inputs=x) + (0 if aside is None else aside)

  class Calls(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = Layer(name='layer')
      return layer(x), layer(aside=x[:, :1], x=x), layer(x, aside=x[:, :1])

  model, x = Calls(), jnp.arange(6.0).reshape(2, 3)
  variables = model.init(jax.random.key(0), x)
  own = variables['params']['layer']['fc']
  for pattern, factor in (('layer', 2.0), ('layer/fc', 3.0)):
    found = apply(model, variables, x, hooks=[Hook(pattern, input=lambda site, x, f=factor: f * x)])
    y = factor * x @ own['kernel'] + own['bias']
    for given, expected in zip(found, (y, y + x[:, :1], y + x[:, :1])):
      np.testing.assert_allclose(given, expected, rtol=1e-6)


def test_a_hook_works_at_the_methods_that_it_names():
  class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      embed = nn.Embed(5, 3, name='embed')
      return embed.attend(embed(tokens))

  model, tokens = Tied(), jnp.arange(4)
  variables = model.init(jax.random.key(0), tokens)
  visited = []

  def visit(site, call, *args):
    visited.append((site.path, site.method))
    return call(*args)

  apply(model, variables, tokens, hooks=[Hook('embed', call=visit)])
  apply(model, variables, tokens, hooks=[Hook('embed', call=visit, methods=('attend',))])
  assert visited == [('embed', '__call__'), ('embed', 'attend')]
  with pytest.raises(ValueError, match='called without one'):
    apply(Empty(), {}, hooks=[Hook('', input=lambda site, x: x)])


class Empty(nn.Module):
  """Takes nothing."""

  def __call__(self):
    """Returns 0."""
    return 0
