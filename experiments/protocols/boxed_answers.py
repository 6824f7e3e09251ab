"""Problems with one right answer, which a decoder writes into a box: its accuracy, and how much it writes."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.harness import networks, results
from experiments.harness.runs import Call, Variables, say
from experiments.harness.settings import found_by, free
from jaxlab import evaluation, models

METRICS = ('right_answers', 'written_tokens')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
  """Problems, and how a decoder is asked.

  Attributes:
    model: name and fields of `jaxlab.models.create`.
    file: lines of JSON with `problem` and `answer`.
    tokenizer: the model's `tokenizer.json`.
    prompt: around `{problem}`; no template of a chat.
    max_new_tokens: where an output is cut off.
    max_prompt: tokens of the longest prompt; shorter ones are padded on the left.
    end: the token that ends an output.
    batch_size: problems that are answered at once.
  """

  model: Mapping[str, Any]
  file: str
  tokenizer: str
  prompt: str = (
    '{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}.'
  )
  max_new_tokens: int = 8192
  max_prompt: int = 512
  end: int
  batch_size: int = free(1)

  @property
  def needs(self) -> str:
    """Where the problems come from, in a sentence."""
    return (
      f'{self.file}: problems, a line of JSON with "problem" and "answer" each; {self.tokenizer}: the '
      "model's tokenizer (pip install tokenizers)"
    )

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    problems = list(found_by('model', networks.create, self.model))
    yield from problems
    size = None if problems else getattr(networks.create(self.model), 'vocab_size', None)
    if not problems and size is None:
      yield f'model: {self.model.get("name")!r} is no network over tokens.'
    elif size is not None and not 0 <= self.end < size:
      yield f'end={self.end}: expected one of the {size} tokens of the model.'
    if '{problem}' not in self.prompt:
      yield f'prompt={self.prompt!r}: expected a text with {{problem}}.'
    for name in ('max_new_tokens', 'max_prompt', 'batch_size'):
      if getattr(self, name) < 1:
        yield f'{name}={getattr(self, name)}: expected at least 1.'


class Problems(NamedTuple):
  """Problems that were read.

  Attributes:
    tokenizer: of the library tokenizers.
    prompts: tokens of each.
    answers: of each.
  """

  tokenizer: Any
  prompts: list[list[int]]
  answers: list[str]


def load(own: Answers) -> Problems:
  """Returns the problems as tokens.

  Raises:
    FileNotFoundError: if a file is not there.
    ValueError: for a file without problems or in another encoding than UTF-8, a line of another kind or with
      an empty answer (naming it), a prompt that is too long or holds tokens that the model does not know, a
      file that is no tokenizer.
    ModuleNotFoundError: without the library tokenizers; says how to install it.
  """
  if not pathlib.Path(own.file).is_file():
    raise FileNotFoundError(f'{own.file}: there is no such file.')
  tokenizer, vocab_size = (
    models.read_tokenizer(own.tokenizer),
    networks.create(own.model).vocab_size,
  )
  prompts, answers = [], []
  for where, problem, answer in _lines(own.file):
    ids = tokenizer.encode(own.prompt.replace('{problem}', problem)).ids
    if len(ids) > own.max_prompt:
      raise ValueError(f'{where}: {len(ids)} tokens, more than {own.max_prompt}.')
    if max(ids, default=0) >= vocab_size:
      raise ValueError(
        f'{where}: {own.tokenizer} makes the token {max(ids)} of it, the model has {vocab_size} tokens.'
      )
    prompts.append(ids)
    answers.append(answer)
  if not prompts:
    raise ValueError(f'{own.file} holds no problems.')
  return Problems(tokenizer, prompts, answers)


def _lines(name: str) -> Iterator[tuple[str, str, str]]:
  """Yields place, problem and answer of each line of a file."""
  try:
    with open(name, encoding='utf-8') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          yield f'{name}:{number}', *_item(f'{name}:{number}', line)
  except UnicodeDecodeError as error:
    raise ValueError(f'{name} is no text in UTF-8: {error}.') from error


def _item(where: str, line: str) -> tuple[str, str]:
  try:
    item = json.loads(line)
    problem, answer = str(item['problem']), str(item['answer'])
  except (json.JSONDecodeError, KeyError, TypeError) as error:
    raise ValueError(f'{where}: expected JSON with problem, answer.') from error
  if not answer.strip():
    raise ValueError(f'{where}: the answer is empty, which every box contains.')
  return problem, answer


def require_model(own: Answers, checkpoint: str) -> None:
  """Raises ValueError if the `config.json` of a checkpoint's folder tells what `model` does not compute.

  Sizes are told by the weights: looked at are heads, the base of rotary positions, their scaling and the
  norms' epsilon.
  """
  file = pathlib.Path(checkpoint) / 'config.json'
  if not file.is_file():
    return
  try:
    told = models.from_config(file)
  except ValueError as error:
    raise ValueError(f'{file}: {error}') from error
  model = networks.create(own.model)
  for name in ('num_heads', 'rope_theta', 'rope_scaling', 'epsilon'):
    given, expected = getattr(model, name, None), getattr(told, name, None)
    if given != expected:
      raise ValueError(f'answers.model: {name}={given}, but {file} tells {expected}.')


def judge(
  own: Answers,
  variables: Variables,
  problems: Problems,
  file: pathlib.Path | None = None,
  network: Any = None,
) -> dict[str, float]:
  """Returns how many problems are right, of greedy outputs.

  `right_answers`, the percentage whose answer an output boxes (`evaluation.aime_correct`); `written_tokens`,
  the mean number of tokens of prompt and output, with the token that ends it.

  Args:
    own: how the decoder is asked.
    variables: of the decoder.
    problems: that are asked.
    file: JSON, where outputs are written after each batch and a killed run goes on from; None: nowhere.
    network: what tells the decoder from others, JSON; outputs of another one are not taken.
  """
  model = networks.create(own.model)
  asked = {name: value for name, value in dataclasses.asdict(own).items() if name != 'batch_size'}
  asked = json.dumps([asked, problems.prompts, problems.answers, network], default=str)
  identity = hashlib.sha256(asked.encode()).hexdigest()
  found = _written(file, identity)
  variables = jax.device_put(variables)
  for start in range(len(found), len(problems.prompts), own.batch_size):
    part = problems.prompts[start : start + own.batch_size]
    prompt = np.zeros((own.batch_size, own.max_prompt), np.int32)
    mask = np.zeros(prompt.shape, bool)
    for row in range(own.batch_size):  # a last batch is filled with its last problem
      ids = part[min(row, len(part) - 1)]
      prompt[row, -len(ids) :], mask[row, -len(ids) :] = ids, True
    outputs = np.asarray(generated(own, model, variables, prompt, mask))
    for ids, tokens, answer in zip(part, outputs, problems.answers[start:]):
      ends = np.flatnonzero(tokens == own.end)
      tokens, end = (tokens[: ends[0]], 1) if ends.size else (tokens, 0)
      text = problems.tokenizer.decode(tokens.tolist())
      right, length = evaluation.aime_correct(text, answer), len(ids) + len(tokens) + end
      found.append({'right': bool(right), 'tokens': length, 'output': text})
    say(f'{len(found)} of {len(problems.prompts)} problems: {sum(o["right"] for o in found)} right')
    if file is not None:
      file.parent.mkdir(parents=True, exist_ok=True)
      results.save_json(file, {'identity': identity, 'answers': found})
  return {
    'right_answers': 100 * float(np.mean([item['right'] for item in found])),
    'written_tokens': float(np.mean([item['tokens'] for item in found])),
  }


def _written(file: pathlib.Path | None, identity: str) -> list[dict[str, Any]]:
  """Returns the answers that a file holds, if they are of the same network and problems."""
  if file is None or not file.exists():
    return []
  held = json.loads(file.read_text(encoding='utf-8'))
  return held['answers'] if held['identity'] == identity else []


def generated(own: Answers, model: nn.Module, variables: Variables, prompt: Any, mask: Any) -> Any:
  """Returns what the decoder writes behind prompts that are padded on the left."""
  return models.generate(
    model, variables, prompt, mask=mask, max_new_tokens=own.max_new_tokens, eos=own.end
  )


def program(own: Answers) -> Call:
  """Returns the generation as a program."""
  model = networks.create(own.model)

  def make(mesh: jax.sharding.Mesh) -> tuple[Any, tuple[Any, ...]]:
    del mesh
    shape = (own.batch_size, own.max_prompt)
    variables = dict(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    prompt = jax.ShapeDtypeStruct(shape, jnp.int32)
    mask = jax.ShapeDtypeStruct(shape, jnp.bool_)
    function = lambda *arguments: generated(own, model, *arguments)  # noqa: E731
    return function, (variables, prompt, mask)

  return Call(make)
