"""EFPC: Towards Efficient and Flexible Prompt Compression (Cao et al., 2025, arXiv 2503.07956).

A small encoder says of each token of a prompt how probably it is to be preserved, and the most probable words
stay. LLMLingua-2 learns that from texts that a teacher shortened for nothing in particular; EFPC adds a few
that were shortened for an instruction, which then stands before the text. Claim: with 1 % or 10 % more data
of that kind a prompt keeps far more of what an instruction needs, and the same network still compresses
without one.

  python -m experiments.efpc
  python -m experiments.efpc --config=minilm
  python -m experiments.efpc --config=xlm_roberta_large --workdir=DIR
  python -m experiments.efpc --compress FILE --instruction "Who owns the lamp?" --rate 0.25 --checkpoint DIR

The last command writes FILE (`-`: what is piped in) without its less important words. DIR is a work directory
that the experiment left, or a folder of a compressor, such as a published one of LLMLingua-2.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.harness import launcher, pictures, results
from experiments.harness.commands import Command
from experiments.harness.runs import Run, say
from experiments.protocols import prompt_compression
from experiments.protocols.prompt_compression import holds
from jaxlab import compression, data

FOLDER = 'compressor'  # of the one that `--compress` takes, in the work directory
ORACLE = 'oracle'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(prompt_compression.Settings):
  """Settings of EFPC.

  Attributes:
    added: instructed sequences for one plain sequence, a row each; 0 is LLMLingua-2's way, the baseline.
    kept: the one of `added` whose compressor is left in the work directory.
  """

  added: tuple[float, ...] = (0.0, 0.01, 0.1, 1.0)
  kept: float = 0.1


def title(added: float) -> str:
  """Returns the name of a row."""
  return f'base + {100 * added:g} %' if added else 'base'


def check(config: Settings) -> Iterator[str]:
  """Yields everything that is wrong with the settings."""
  yield from prompt_compression.check(config)
  if not config.added or len(set(config.added)) < len(config.added) or min(config.added) < 0:
    yield f'added={config.added}: expected different shares of at least 0.'
  if config.kept not in config.added:
    yield f'kept={config.kept}: expected one of added={config.added}.'
  if config.data.name == 'facts' and max(config.added, default=0) > 1:
    yield f'added={config.added}: there are as many instructed documents as plain ones, at most 1.'
  yield from results.check_claims(
    config, [r'base( \+ [\d.]+ %)?', ORACLE], [r'(agnostic_)?(retention|f1)_[\d.]+x']
  )


def programs(config: Settings, facts: None = None) -> dict[str, Run]:
  """Returns the trainings by row."""
  del facts
  return {
    f'added_{added:g}': prompt_compression.training(config, title(added), {'added': added})
    for added in config.added
  }


def run(config: Settings, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains a compressor on each mixture of plain and instructed texts, and compares what they keep."""
  loaded, rows = prompt_compression.load(config), []
  prompt_compression.require_instructed(loaded, max(config.added))
  for added, (name, training) in zip(config.added, programs(config).items()):
    variables = prompt_compression.train(config, training, loaded, added, workdir / name)
    made = prompt_compression.compressor(config, loaded, variables)
    if added == config.kept:
      compression.save_compressor(workdir / FOLDER, made)
    found = prompt_compression.judge(config, made, loaded.test)
    rows.append(results.row(title(added), 'method' if added else 'baseline', found))
    say(f'{title(added)}: ' + ', '.join(f'{key} {value:.1f}' for key, value in found.items()))
  if config.data.name == 'facts':
    rows.append(results.row(ORACLE, 'reference', oracle(config, loaded.test)))
  draw(config, rows, workdir / 'retention.png')
  return results.results(config, rows, title='in %')


def oracle(config: Settings, test: Sequence[data.PromptRecord]) -> dict[str, float]:
  """Returns how many answers what the oracle keeps holds, for the instruction and without it."""
  asked, found = [record for record in test if record.instruction], {}
  for rate in config.rates:
    for name, own in (('retention', True), ('agnostic_retention', False)):
      hits = [
        holds(
          data.oracle_compress(record.text, record.instruction * own, rate=rate), record.answers
        )
        for record in asked
      ]
      found[f'{name}_{1 / rate:g}x'] = 100 * float(np.mean(hits))
  return found


def draw(config: Settings, rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Draws answers that are still there, and F1, of each row."""
  names = [f'{1 / rate:g}x' for rate in config.rates]
  series = {
    f'{name}{", no instruction" if prefix else ""}': (prefix, name)
    for name in names
    for prefix in ('', 'agnostic_')
  }
  panels = {
    text: {label: f'{prefix}{metric}_{name}' for label, (prefix, name) in series.items()}
    for text, metric in (('answers that stay (%)', 'retention'), ('F1 of kept words (%)', 'f1'))
  }
  pictures.bars(path, config, rows, panels)


def add_options(group: Any) -> None:
  """Adds the options of `--compress`."""
  group.add_argument('--compress', metavar='FILE', help="a text to shorten; '-': standard input")
  group.add_argument('--instruction', default='', metavar='TEXT', help='what the text is for')
  group.add_argument('--rate', metavar='SHARE', help='of the tokens that stay, in (0, 1]')
  group.add_argument('--budget', metavar='TOKENS', help='number of the tokens that stay')
  group.add_argument(
    '--force_tokens', '--force-tokens', nargs='*', default=(), metavar='TOKEN',
    help=r"words that stay, such as . or ?; '\n' keeps line breaks",
  )  # fmt: skip
  group.add_argument(
    '--checkpoint', metavar='DIR', help='work directory, or folder of a compressor'
  )
  group.add_argument(
    '--output', metavar='FILE', help='where the short text goes, not to the screen'
  )


def compress(options: argparse.Namespace) -> None:
  """Does what `--compress` asks for: the short text goes out, what became of it to standard error.

  An instruction that is too long is cut, with a warning.

  Raises:
    ValueError: for options that cannot be, an empty text, or a folder of something else.
    FileNotFoundError: for a file or a compressor that is not there.
  """
  rate, budget = _number(options, 'rate', float), _number(options, 'budget', int)
  if (rate is None) == (budget is None):
    raise ValueError('--rate and --budget: expected one of the two.')
  if rate is not None and not 0 < rate <= 1:
    raise ValueError(f'--rate={rate:g} is not in (0, 1].')
  if budget is not None and budget < 1:
    raise ValueError(f'--budget={budget}: expected at least 1 token.')
  force = tuple(token.replace('\\n', '\n') for token in options.force_tokens)
  if '' in force:
    raise ValueError('--force_tokens: expected words, got an empty one.')
  if not options.checkpoint:
    raise ValueError('--checkpoint=DIR is missing: a work directory that the experiment left.')
  output = _output(options.output)
  made = compression.load_compressor(_folder(pathlib.Path(options.checkpoint)))
  text = _read(options.compress)
  found = compression.compress_prompt(
    text, options.instruction, **made._asdict(), rate=rate, budget=budget, force_tokens=force
  )
  if output is not None:
    _write(output, f'{found.text}\n')
  else:
    print(found.text)
  print(
    f'{found.original_tokens} tokens, {found.compressed_tokens} stay ({100 * found.kept_share:.1f} %)',
    file=sys.stderr,
  )


def _number(options: argparse.Namespace, name: str, kind: type) -> Any:
  text = getattr(options, name)
  try:
    return None if text is None else kind(text)
  except ValueError:
    wanted = 'a number' if kind is float else 'a whole number'
    raise ValueError(f'--{name}={text}: expected {wanted}.') from None


def _output(name: str | None) -> pathlib.Path | None:
  """Returns where the short text goes, which must be a file in a folder that is there."""
  if not name:
    return None
  path = pathlib.Path(name)
  if path.is_dir():
    raise ValueError(f'--output={path} cannot be written: it is a folder, expected a file.')
  if not path.parent.is_dir():
    raise ValueError(f'--output={path} cannot be written: there is no folder {path.parent}.')
  return path


def _write(path: pathlib.Path, text: str) -> None:
  """Writes a file at once or not at all."""
  partial = path.with_name(f'{path.name}.partial')
  try:
    partial.write_text(text, encoding='utf-8')
    partial.replace(path)
  except OSError as error:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise ValueError(f'--output={path} cannot be written: {error}.') from error


def _read(name: str) -> str:
  """Returns the text of a file or of standard input."""
  path = pathlib.Path(name)
  if name != '-' and not path.is_file():
    raise FileNotFoundError(f'--compress={name}: there is no such file.')
  try:
    text = (sys.stdin.buffer.read() if name == '-' else path.read_bytes()).decode('utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'--compress={name} is no text in UTF-8: {error}.') from error
  if not text.strip():
    raise ValueError(f'--compress={name} holds no text.')
  return text


def _folder(given: pathlib.Path) -> pathlib.Path:
  """Returns the folder of the compressor that a work directory holds, or that is given."""
  if (given / FOLDER).is_dir():
    return given / FOLDER
  if (given / 'config.json').is_file():
    return given
  inner = sorted(own.parent for own in given.glob(f'*/{FOLDER}')) if given.is_dir() else []
  if inner:
    raise ValueError(
      f'--checkpoint={given} holds several: give one of {", ".join(map(str, inner))}.'
    )
  owner, what = given / 'experiment.json', 'there is no such folder'
  if owner.is_file():
    own = json.loads(owner.read_text(encoding='utf-8'))
    what = f'a work directory of {own.get("paper")}/{own.get("setting")} without a compressor'
    if own.get('paper') == 'efpc':
      what += ': its run has not got as far'
  elif given.is_dir():
    what = 'it holds no compressor'
  raise FileNotFoundError(f'--checkpoint={given}: {what}. python -m experiments.efpc makes one.')


COMMAND = Command('--compress', 'compress a prompt', add_options, compress)

if __name__ == '__main__':
  launcher.main('efpc')
