import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from golden_vectors import assert_close

from experiments import sfn
from experiments.harness import launcher, supervised
from experiments.harness.tasks import CompletionTask
from experiments.protocols import boxed_answers, checkpoint_pairs, completions
from jaxlab import data, models
from jaxlab.models.checkpoint_names import HF_LLAMA

TINY = {
  'network.model.width': 8, 'network.model.depth': 2, 'network.model.num_heads': 2,
  'network.model.hidden': 12, 'network.data.train_size': 64, 'network.data.train_options.size': 64,
  'network.data.test_options.size': 32, 'tuning.data.train_size': 64,
  'tuning.data.train_options.size': 64, 'tuning.data.test_options.size': 32,
  'tuning.recipe.epochs': 1, 'runs': ('F2', 'F4'), 'blocks': (1, 2), 'log_every': 1,
  'destroyed': (('v_proj',), ('o_proj',), ('.*_proj',)), 'merges': (('o_proj',), ('.*',)),
  'eval_batch_size': 32,
}  # fmt: skip


@pytest.fixture(scope='module')
def config():
  return launcher.load('sfn', 'embedded', TINY)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp('sfn')


@pytest.fixture(scope='module')
def found(config, workdir):
  """The results of a short run, whose checkpoints stay in `workdir`."""
  launcher.check(config)
  return sfn.run(config, workdir)


def metrics(found):
  return {row['name']: row['metrics'] for row in found['rows']}


@pytest.fixture(scope='module')
def decoder(config):
  """The decoder with parameters as drawn, but larger ones."""
  params = jax.jit(config.model.init)(jax.random.key(3), jnp.zeros((1, 4), jnp.int32))['params']
  return config.model, {'params': jax.tree.map(lambda w: w * (20 if w.ndim > 1 else 1), params)}


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  return logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))


def test_loss_is_that_of_completions_alone(config, decoder):
  model, variables = decoder
  source = data.load('sums', 'test', **config.tuning.data.test_options)
  batch = {name: array[:32] for name, array in source.arrays.items()}
  logits = jax.jit(model.apply)(variables, batch['tokens'][:, :-1])
  each = -np.take_along_axis(log_softmax(logits), batch['tokens'][:, 1:, None], -1)[..., 0]
  expected = each[batch['counted']].mean()
  targets = batch['tokens'][:, 1:], batch['counted']
  seen = supervised.Seen(jnp.int32(0), None)
  gradient = jax.jit(jax.value_and_grad(lambda x: completions.completion_loss(x, targets, seen)))
  value, slope = gradient(logits)
  assert_close(value, expected, 1e-5)
  assert not np.asarray(slope)[~batch['counted']].any()
  assert np.abs(np.asarray(slope)[batch['counted']]).sum(-1).all()
  judged = completions.judge(config, config.tuning.data, model, variables, source)
  assert judged['loss'] == pytest.approx(expected, rel=1e-5)
  scores = CompletionTask(25).score(logits, targets)
  row = each[5][batch['counted'][5]]
  np.testing.assert_allclose(scores['loss'][5], row.mean(), rtol=1e-5)


def test_exact_is_what_the_decoder_writes_itself(config, decoder):
  model, variables = decoder
  prompts = np.random.default_rng(0).integers(1, 14, (8, 5))
  written = np.asarray(models.generate(model, variables, prompts, max_new_tokens=6))
  wrong = written.copy()
  wrong[1::2, [0, 5, 3, 2]] = (wrong[1::2, [0, 5, 3, 2]] + 1) % 14
  own = config.tuning.data
  for answers, share in ((written, 100), (wrong, 50)):
    source = data.Completions(list(prompts), list(answers), own.length, 14)
    found = completions.judge(config, own, model, variables, source)
    assert found['exact_match'] == share
  hook = models.remove_blocks(['layers_0'])
  other = completions.judge(config, own, model, variables, source, [hook])
  assert other['loss'] != found['loss']


def test_a_run_compares_all_tools(config, workdir, found):
  rows = metrics(found)
  assert set(rows) == {
    'before tuning', 'F2: with o_proj', 'F4: all', 'merge o_proj', 'merge .*', 'v_proj', 'o_proj', '.*_proj',
    'whole blocks', 'q_proj', 'k_proj', 'up_proj', 'gate_proj', 'down_proj',
  }  # fmt: skip
  # The identities, on what the experiment itself measures.
  assert rows['v_proj']['zero'] == pytest.approx(rows['o_proj']['zero'], abs=1e-5)
  assert rows['.*_proj']['zero'] == pytest.approx(rows['whole blocks']['remove'], abs=1e-5)
  assert rows['o_proj']['zero'] != rows['o_proj']['reinit']
  assert rows['merge .*'] == {**rows['merge .*'], 'merged': 100, 'loss': rows['F4: all']['loss']}
  assert rows['F4: all']['trained'] == 100 > rows['F2: with o_proj']['trained'] > 0
  types = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'gate_proj', 'down_proj')
  assert sum(rows[name]['delta_share'] for name in types) == pytest.approx(100)
  for name in ('delta', 'relative_changes', 'freeze_and_destruction'):
    assert (workdir / f'{name}.png').stat().st_size > 1000


def test_freeze_leaves_all_but_the_chosen_types_as_they_were(config, workdir, found):
  base = models.open_state_dict(workdir / 'checkpoints/A')
  state = sfn.runs.train(
    sfn.tuning(config, 'F2'), data.load('sums', 'train', **config.tuning.data.train_options),
    workdir / 'F2',
  )  # fmt: skip
  tuned = models.to_torch(jax.device_get(state.variables), renames=HF_LLAMA)
  moved = {name for name in base if not np.array_equal(base[name], tuned[name])}
  expected = {
    name for name in base if any(own in name for own in ('o_proj', 'norm', 'embed', 'lm_head'))
  }
  assert moved == expected
  changes = list(models.parameter_changes(base, tuned))
  rows = checkpoint_pairs.delta(changes)
  assert rows['o_proj']['delta_share'] == 100 and rows['q_proj']['delta'] == 0


def test_checkpoints_of_a_run_are_compared_and_merged_as_files(workdir, found, tmp_path):
  folders = {
    name: str(workdir / 'checkpoints' / own) for name, own in (('base', 'A'), ('tuned', 'B'))
  }
  (workdir / 'checkpoints/A/config.json').write_text('{"model_type": "llama"}')
  changes = {**folders, 'merges': (('o_proj',), ('.*',)), 'max_shard_bytes': 1e3}
  other = launcher.load('sfn', 'checkpoints', changes)
  launcher.check(other)
  result = metrics(sfn.run(other, tmp_path))
  for name, own in metrics(found).items():
    if 'delta' in own:
      assert result[name]['delta'] == pytest.approx(own['delta'], rel=1e-6)
      assert result[name]['bimodal'] == own['bimodal']
  base, tuned = (models.open_state_dict(folders[name]) for name in ('base', 'tuned'))
  merged = models.open_state_dict(tmp_path / 'merged/o_proj')
  everything = models.open_state_dict(tmp_path / 'merged/all')
  for name in base:
    expected = tuned if 'o_proj' in name else base
    np.testing.assert_array_equal(merged[name], expected[name])
    np.testing.assert_array_equal(everything[name], tuned[name])
  assert len(list((tmp_path / 'merged/o_proj').glob('*.safetensors'))) > 2
  assert (tmp_path / 'merged/o_proj/config.json').is_file()
  ranked = json.loads((tmp_path / 'distances.json').read_text())
  assert list(ranked.values()) == sorted(ranked.values(), reverse=True)
  assert set(ranked) == set(base)
  assert result['merge o_proj']['merged'] == pytest.approx(metrics(found)['merge o_proj']['merged'])


def test_a_cut_file_is_named_before_anything_is_written(workdir, found, tmp_path):
  file = tmp_path / 'cut/model.safetensors'
  file.parent.mkdir()
  file.write_bytes((workdir / 'checkpoints/B/model.safetensors').read_bytes()[:-4])
  changes = {'base': str(workdir / 'checkpoints/A'), 'tuned': str(file.parent)}
  with pytest.raises(ValueError, match=r'cut/model\.safetensors.* is no whole safetensors file'):
    launcher.launch(launcher.load('sfn', 'checkpoints', changes), tmp_path / 'run')
  assert not list((tmp_path / 'run').glob('merged*'))


def test_one_head_of_its_own_is_said_and_given(workdir, found, tmp_path):
  base = models.open_state_dict(workdir / 'checkpoints/A')
  tied = {name: base[name] for name in base if name != 'lm_head.weight'}
  models.save_state_dict(tmp_path / 'tied', tied)
  tuned = str(workdir / 'checkpoints/B')
  with pytest.raises(ValueError, match=r'tied: its embedding is the head.*config\.untie=true'):
    checkpoint_pairs.opened(str(tmp_path / 'tied'), tuned)
  first, second = checkpoint_pairs.opened(str(tmp_path / 'tied'), tuned, untie=True)
  assert set(first) == set(second)
  np.testing.assert_array_equal(first['lm_head.weight'], base['model.embed_tokens.weight'])


@pytest.fixture
def answers(tmp_path):
  """Two problems, a tokenizer of words, and a small decoder."""
  tokenizers = pytest.importorskip('tokenizers')
  words = ['<end>', 'What', 'is', 'it', '?', r'\boxed{204}', r'\boxed{7}', 'Say', 'so']
  own = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token='<end>')
  )
  own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  own.save(str(tmp_path / 'tokenizer.json'))
  problems = [{'problem': 'What is it ?', 'answer': 204}, {'problem': 'it', 'answer': '20'}]
  (tmp_path / 'problems.jsonl').write_text('\n'.join(map(json.dumps, problems)) + '\n')
  model = {'name': 'llama', 'vocab_size': 9, 'width': 8, 'depth': 1, 'num_heads': 2, 'hidden': 8}
  return boxed_answers.Answers(
    model=model, file=str(tmp_path / 'problems.jsonl'), tokenizer=str(tmp_path / 'tokenizer.json'),
    prompt='Say {problem} so', max_new_tokens=3, max_prompt=7, end=0, batch_size=4,
  )  # fmt: skip


def test_answers_count_where_a_box_before_the_end_contains_them(answers, monkeypatch):
  assert not list(answers.check())
  problems = boxed_answers.load(answers)
  assert problems.prompts == [[7, 1, 2, 3, 4, 8], [7, 3, 8]] and problems.answers == ['204', '20']

  def written(own, model, variables, prompt, mask):
    assert prompt.shape == (4, 7) and mask[1].tolist() == [False] * 4 + [True] * 3
    assert prompt[1, 4:].tolist() == prompt[3, 4:].tolist() == [7, 3, 8]
    return jnp.array([[6, 0, 5], [3, 5, 0], [5, 5, 5], [5, 5, 5]])

  boxed_answers.program(answers).trace()
  monkeypatch.setattr(boxed_answers, 'generated', written)
  found = boxed_answers.judge(answers, {'params': {}}, problems)
  # The first of three tokens is ended by the second, the second output by its third.
  assert found == {'right_answers': 50, 'written_tokens': (6 + 2 + 3 + 3) / 2}


def test_answers_of_a_killed_run_are_not_asked_for_again(answers, monkeypatch, tmp_path):
  one = dataclasses.replace(answers, batch_size=1)
  problems, calls = boxed_answers.load(one), []

  def written(own, model, variables, prompt, mask):
    calls.append(prompt.shape[0])
    if len(calls) == 2:
      raise KeyboardInterrupt
    return jnp.array([[[5, 0, 0], [6, 3, 3], [3, 5, 0]][len(calls) % 3]] * prompt.shape[0])

  monkeypatch.setattr(boxed_answers, 'generated', written)
  file = tmp_path / 'answers/A.json'
  with pytest.raises(KeyboardInterrupt):
    boxed_answers.judge(one, {'params': {}}, problems, file, 'A')
  found = boxed_answers.judge(answers, {'params': {}}, problems, file, 'A')
  assert calls == [1, 1, 4]
  kept = json.loads(file.read_text())['answers']
  assert [item['tokens'] for item in kept] == [9, 5]
  assert found['written_tokens'] == 7 and found['right_answers'] == 50
  assert boxed_answers.judge(answers, {'params': {}}, problems, file, 'A') == found
  assert calls == [1, 1, 4]
  boxed_answers.judge(answers, {'params': {}}, problems, file, 'B')
  assert calls == [1, 1, 4, 4]


def test_a_model_that_computes_something_else_is_refused(answers, tmp_path):
  config = {'model_type': 'llama', 'num_attention_heads': 2, 'rms_norm_eps': 1e-6, 'hidden_size': 8}
  for change, message in (
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, "config.json: .*scaled by 'llama3'"),
    ({'rope_theta': 5e5}, r'answers.model: rope_theta=10000.0, but .*config.json tells 500000.0'),
    ({'num_attention_heads': 4}, 'answers.model: num_heads=2'),
  ):
    (tmp_path / 'config.json').write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
      boxed_answers.require_model(answers, str(tmp_path))
  (tmp_path / 'config.json').write_text(json.dumps(config))
  boxed_answers.require_model(answers, str(tmp_path))
  boxed_answers.require_model(answers, str(tmp_path / 'nowhere'))


def test_files_of_problems_that_are_none_are_named(answers, tmp_path):
  file = tmp_path / 'problems.jsonl'
  file.write_text('{"problem": "it"}\n')
  with pytest.raises(ValueError, match=r'problems\.jsonl:1: expected JSON with problem, answer'):
    boxed_answers.load(answers)
  file.write_text('{"problem": "it it it it it it it", "answer": 1}\n')
  with pytest.raises(ValueError, match=r'problems\.jsonl:1: 9 tokens, more than 7'):
    boxed_answers.load(answers)
  file.write_text('\n')
  with pytest.raises(ValueError, match='holds no problems'):
    boxed_answers.load(answers)
  file.write_text('{"problem": "it", "answer": 1}\n{"problem": "it", "answer": " "}\n')
  with pytest.raises(ValueError, match=r'problems\.jsonl:2: the answer is empty'):
    boxed_answers.load(answers)
  file.write_bytes(b'{"problem": "it", "answer": "\xff"}\n')
  with pytest.raises(ValueError, match=r'problems\.jsonl is no text in UTF-8'):
    boxed_answers.load(answers)
  file.write_text('{"problem": "it", "answer": 1}\n')
  few = dataclasses.replace(answers, model={**answers.model, 'vocab_size': 8})
  with pytest.raises(ValueError, match='makes the token 8 of it, the model has 8 tokens'):
    boxed_answers.load(few)
  file.unlink()
  with pytest.raises(FileNotFoundError, match=r'problems\.jsonl: there is no such file'):
    boxed_answers.load(answers)


def test_a_line_of_problems_ends_with_its_line_break_alone(answers, tmp_path):
  line = json.dumps({'problem': 'it\u2028is', 'answer': '1'}, ensure_ascii=False)
  (tmp_path / 'problems.jsonl').write_text(f'{line}\n', encoding='utf-8')
  assert boxed_answers.load(answers).prompts == [[7, 3, 2, 8]]


def test_prompts_are_whole_whatever_the_tokenizer_cuts(answers, tmp_path):
  from tokenizers import Tokenizer

  expected, file = boxed_answers.load(answers).prompts, tmp_path / 'tokenizer.json'
  cutting = Tokenizer.from_file(str(file))
  cutting.enable_truncation(2)
  cutting.enable_padding(length=6)
  cutting.save(str(file))
  assert boxed_answers.load(answers).prompts == expected
  file.write_text('{"version"')
  with pytest.raises(ValueError, match=r'tokenizer\.json.* is no tokenizer\.json'):
    boxed_answers.load(answers)


@pytest.mark.parametrize('end', [-1, 9])
def test_an_end_that_the_model_cannot_write_is_refused(answers, end):
  problems = list(dataclasses.replace(answers, end=end).check())
  assert problems == [f'end={end}: expected one of the 9 tokens of the model.']


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'base': 'A', 'tuned': 'B'}, 'base, tuned: expected two checkpoints, or a network'),
    ({'tuning': None}, 'tuning: expected what a network is tuned on'),
    ({'runs': ()}, 'runs is empty'),
    ({'network.pretrained': 'llama.other'}, 'network: expected public weights or a recipe, not'),
    ({'runs': ('F1', 'F1')}, 'runs=F1,F1: each may be there once'),
    ({'runs': ('F1', 'F2')}, "merges: B is the run 'F4'"),
    ({'merges': (('o_prj',),)}, "merges: No module matches include 'o_prj'"),
    ({'merges': (('mlp',), ('mlp',))}, 'merges: expected groups of different names, got mlp, mlp'),
    ({'merges': ((),)}, 'merges: expected groups of module types, got an empty one'),
    ({'destroyed': ((),)}, 'destroyed: expected groups'),
    ({'destroyed': (('lm_head',),)}, r"destroyed, blocks: include: \['lm_head'\] match nothing"),
    ({'blocks': (1, 5)}, r'destroyed, blocks: .*expected indices in \[0, 4\), got \[4\]'),
    ({'network.model.tied': True, 'merges': (('lm_head',),)}, "merges: include: 'lm_head' is not"),
    ({'base_share': 2.0}, 'base_share=2'),
    ({'std': -1.0}, 'std=-1'),
    ({'bins': 3}, 'bins=3'),
    ({'timed': -1}, 'timed=-1'),
    ({'max_shard_bytes': 0.0}, 'max_shard_bytes=0'),
    ({'tuning.recipe.batch_size': 4800}, 'tuning.recipe.batch_size=4800: more than 3200 records'),
    ({'network.model.num_heads': 5}, 'network.model: Llama: width=96 is not divisible'),
  ],
)
def test_impossible_settings_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    launcher.check(launcher.load('sfn', 'embedded', changes))


@pytest.mark.exhaustive
def test_variants_train_as_many_parameters_as_the_paper_counts():
  config = launcher.load('sfn', 'qwen2_5_32b')
  shapes = sfn.shapes(config.model, config.network.task)
  total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  for name, billions in {'F1': 1.5, 'F2': 3.2, 'F3': 5.6, 'F4': 32.8}.items():
    share = sfn.share(shapes, models.tuned_parameters(shapes, sfn.TYPES[name]))
    # The paper's first number is cut, the others are rounded.
    assert share / 100 * total / 1e9 == pytest.approx(billions, abs=0.07)


def test_costs_of_a_step_are_those_over_full_tuning(config, monkeypatch):
  from experiments.harness import costs

  def relative(sides, base, mesh, repeats):
    assert list(sides) == ['F4', 'F2'] and base == 'F4' and repeats == 3
    shapes = {
      name: jax.eval_shape(side.program.init, jax.random.key(0)) for name, side in sides.items()
    }
    held = {
      name: sum(leaf.size for leaf in jax.tree.leaves(own.opt_state))
      for name, own in shapes.items()
    }
    assert held['F2'] < held['F4']
    return {name: {'time': float(len(sides))} for name in sides}

  monkeypatch.setattr(costs, 'relative', relative)
  config = launcher.load('sfn', 'embedded', {**TINY, 'timed': 3})
  found = sfn.step_costs(config, {'F2': sfn.tuning(config, 'F2')})
  assert found['F2'] == {'time': 2}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'network.model.vocab_size': 5}, r'model\.vocab_size=5, but sums has 14 tokens'),
    ({'tuning.data.test_options.low': 50, 'tuning.data.test_options.high': 40}, 'low=50'),
    ({'tuning.data.train_size': 63}, 'data.train_size=63, but 64 records'),
  ],
)
def test_data_are_looked_at_before_anything_is_trained(changes, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    sfn.run(launcher.load('sfn', 'embedded', {**TINY, **changes}), tmp_path)
  assert not list(tmp_path.iterdir())


def test_problems_are_read_before_anything_is_trained(config, answers, tmp_path):
  (tmp_path / 'problems.jsonl').write_text('\n')
  with pytest.raises(ValueError, match='holds no problems'):
    sfn.run(dataclasses.replace(config, answers=answers), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('changes', 'name'),
  [
    ({'destroyed': (('o_proj',),)}, 'destroyed'),
    ({'blocks': (1, 2)}, 'blocks'),
    ({'runs': ('F2',)}, 'runs'),
    ({'std': 0.1}, 'std'),
    ({'compared': False}, 'compared'),
    ({'timed': 2}, 'timed'),
  ],
)
def test_two_checkpoints_are_not_tuned_or_destroyed(changes, name):
  with pytest.raises(ValueError, match=f'{name}=.*: is of a network that is tuned here'):
    launcher.check(launcher.load('sfn', 'checkpoints', changes))


def test_two_checkpoints_need_both_names():
  with pytest.raises(ValueError, match='base, tuned: expected two checkpoints'):
    launcher.check(launcher.load('sfn', 'checkpoints', {'tuned': ''}))


def test_variants_of_freeze_train_what_the_paper_says(config):
  shapes = sfn.shapes(config.model, config.network.task)
  trained = {
    name: {
      '/'.join(path)
      for path, chosen in traverse_util.flatten_dict(models.tuned_parameters(shapes, types)).items()
      if chosen
    }
    for name, types in sfn.TYPES.items()
  }
  always = {'embed_tokens/embedding', 'lm_head/kernel', 'norm/scale'}
  assert always < trained['F1'] < trained['F2'] < trained['F3'] < trained['F4']
  assert len(trained['F4']) == 3 + 2 * 9
  assert trained['F2'] - trained['F1'] == {f'layers_{i}/self_attn/o_proj/kernel' for i in range(2)}
  assert trained['F2'] | trained['qkv'] == trained['F3']
  assert trained['F3'] | trained['mlp'] == trained['F4']
  state = jax.eval_shape(sfn.tuning(config, 'F2').program.init, jax.random.key(0))
  held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
  flat = traverse_util.flatten_dict(shapes, sep='/')
  assert held == 2 * sum(flat[name].size for name in trained['F2'])
