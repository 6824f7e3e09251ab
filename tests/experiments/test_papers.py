"""Every paper and every setting: checked without data, and its programs traced."""

import ast
import importlib
import math
import re

import jax
import pytest
import tables

from experiments.harness import launcher
from experiments.harness.overrides import assignments
from experiments.harness.sections import Mesh
from experiments.harness.settings import plain

PAPERS = sorted(folder.parent.name for folder in launcher.CONFIGS.glob('*/embedded.py'))
SETTINGS = [(paper, path.stem) for paper in PAPERS for path in launcher.settings(paper)]
SMALL = (
  'embedded', 'after_', 'canvases', 'checkpoints', 'fashion_mnist', 'boxes', 'combinations', 'localization',
  'text',
)  # fmt: skip
# Other settings of these papers have the same programs with fewer blocks.
DEEP = ('gpt2_xl', 'places_lt', 'coco_resnet101')


def headlines():
  """Yields the settings that each run looks into: of a paper the embedded and a large one."""
  for paper in PAPERS:
    names = [setting for own, setting in SETTINGS if own == paper]
    large = [name for name in names if name not in DEEP and not name.startswith(SMALL)]
    yield from ((paper, name) for name in ('embedded', *large[:1]))


HEADLINES = list(headlines())
LARGE = [own for own in HEADLINES if own[1] != 'embedded']  # that one runs in the test of its paper


def programs(config):
  return importlib.import_module(f'experiments.{config.paper}').programs(config)


@pytest.mark.parametrize(('paper', 'setting'), tables.few(SETTINGS, *HEADLINES))
def test_every_setting_passes_its_checks_without_data(paper, setting, monkeypatch):
  from jaxlab import data

  for name in ('load', 'ListedImages'):
    monkeypatch.setattr(data, name, lambda *args, **kwargs: pytest.fail('data are opened'))
  launcher.check(launcher.load(paper, setting))


@pytest.mark.parametrize(
  ('paper', 'setting'),
  [
    ('colinearity_decay', 'gpt2'), ('colinearity_decay', 'imagenet_deit_small'), ('mls', 'coco_400'),
    ('ssl_baselines', 'imagenet_dino'), ('ssl_baselines', 'imagenet_moco'), ('tweo', 'gpt2'),
    ('tweo', 'gpt2_xl'), ('tweo', 'imagenet_vit_base'),
  ],
)  # fmt: skip
def test_settings_for_a_large_pod_divide_over_256_chips(paper, setting, monkeypatch):
  def make(mesh):
    sizes = mesh.data, mesh.fsdp, mesh.tensor
    rest = 256 // math.prod(size for size in sizes if size > 0)
    sizes = tuple(rest if size < 0 else size for size in sizes)
    return jax.sharding.AbstractMesh(sizes, ('data', 'fsdp', 'tensor'))

  config = launcher.load(paper, setting)
  monkeypatch.setattr(Mesh, 'make', make)
  launcher.check(config)


@pytest.mark.parametrize(('paper', 'setting'), LARGE)
def test_a_paper_has_a_program_of_its_own_scale_that_can_be_traced(paper, setting):
  found = programs(launcher.load(paper, setting))
  next(iter(found.values())).trace()  # what follows it differs as it does in the embedded setting


@pytest.mark.exhaustive
@pytest.mark.parametrize(('paper', 'setting'), SETTINGS)
def test_every_program_of_every_setting_can_be_traced(paper, setting):
  for program in programs(launcher.load(paper, setting)).values():
    program.trace()


@pytest.mark.parametrize(('paper', 'setting'), tables.few(SETTINGS, *HEADLINES))
def test_what_is_printed_can_be_pasted_back(paper, setting):
  import shlex

  config = launcher.load(paper, setting)
  pasted = [shlex.split(text)[0].removeprefix('--config.') for text in assignments(config)]
  pasted = [text for text in pasted if not text.startswith(('paper=', 'setting='))]
  assert plain(launcher.load(paper, setting, pasted)) == plain(config)


@pytest.mark.parametrize('paper', tables.some(PAPERS, 2))
def test_programs_lower_for_a_mesh(paper):
  from jaxlab.parallel import make_mesh

  found = programs(launcher.load(paper, 'embedded'))
  name, program = next(iter(found.items()))
  assert program.lower(make_mesh()).as_text(), name


def imported(path):
  """Returns the modules of `experiments` that a file imports."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('experiments'):
      found |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
  return found


def test_imports_point_one_way():
  folder = launcher.CONFIGS.parent / 'experiments'
  papers = {f'experiments.{paper}' for paper in PAPERS}
  for room, closed in (
    ('harness', ('experiments.protocols', 'experiments.tools')),
    ('protocols', ('experiments.tools',)),
    ('.', ()),
  ):
    for path in (folder / room).glob('*.py'):
      found = imported(path)
      assert not found & papers, path
      assert not any(name.startswith(closed) for name in found if closed), path
  for path in (folder.parent / 'jaxlab').rglob('*.py'):
    assert not imported(path), path


def test_protocols_name_no_paper():
  folder = launcher.CONFIGS.parent / 'experiments' / 'protocols'
  for file in folder.glob('*.py'):
    text = file.read_text()
    written = text.replace('.', ' ').replace('`', ' ').split()
    assert 'LAST' not in written and not re.search(r'experiments[./]last\b', text), file
    assert not {word.lower() for word in written} & {*PAPERS} - {'last'}, file  # an English word
