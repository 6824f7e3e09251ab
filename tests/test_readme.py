"""README and the papers' pages tell the truth: their code runs, and what they name exists."""

import pathlib
import re

import jax
import pytest

import jaxlab

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
PAGES = sorted(ROOT.glob('mlcollections_configs/*/README.md'))


def test_the_code_runs():
  scope = {}
  for code in re.findall(r'```python\n(.*?)```', README, re.DOTALL):
    exec(code, scope)
  assert scope['codes'].dtype == jax.numpy.int8
  assert scope['features']['avgpool'].shape == (8, 64)
  state = jax.eval_shape(scope['program'].init, jax.random.key(0))
  _, metrics = jax.eval_shape(scope['program'].step, state, {}, scope['program'].batch)
  assert metrics.keys() == {'loss', 'accuracy'}


def test_every_paper_has_a_row_a_script_and_a_page():
  named = re.findall(r'\]\(mlcollections_configs/(\w+)/README.md\).*`experiments\.(\w+)`', README)
  papers = {path.parent.name for path in ROOT.glob('mlcollections_configs/*/embedded.py')}
  assert {folder for folder, _ in named} == papers == {page.parent.name for page in PAGES}
  assert all(folder == script for folder, script in named)
  assert all((ROOT / 'experiments' / f'{script}.py').is_file() for _, script in named)


def test_links_to_files_lead_somewhere():
  for page in [ROOT / 'README.md', *PAGES]:
    for link in re.findall(r'\]\(([^)]+)\)', page.read_text()):
      assert link.startswith('https://') or (page.parent / link).exists(), (page, link)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.parent.name)
def test_a_page_names_functions_and_settings_that_exist(page):
  text = page.read_text()
  functions = re.search(r'^- Functions: (.*)$', text, re.MULTILINE)[1]
  for room, names in re.findall(r'`([\w.]+)\.(\{[^}]+\}|\w+)`', functions):
    holder = jaxlab
    for part in room.split('.'):
      holder = getattr(holder, part)
    for name in names.strip('{}').split(', '):
      assert hasattr(holder, name), f'{room}.{name}'
  settings = re.search(r'^- Settings: (.*)$', text, re.MULTILINE)[1]
  found = {path.stem for path in page.parent.glob('[!_]*.py')}
  assert found == set(re.findall(r'`(\w+)`', settings))


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.parent.name)
def test_a_page_ends_with_the_entry_of_its_paper(page):
  if page.parent.name == 'ssl_baselines':
    return  # papers of others
  text = page.read_text()
  key, authors, number = re.search(
    r'@misc\{(\w+),\n  title=.*\n  author=\{(.*)\},\n  note=.*\n  eprint=\{(.*)\},\n.*\n\}\n```\n\Z',
    text,
  ).groups()
  header = ' '.join(text.partition('```')[0].split())
  assert key == page.parent.name and f'arxiv.org/abs/{number}' in header
  assert authors.replace(' and ', ', ') in header
