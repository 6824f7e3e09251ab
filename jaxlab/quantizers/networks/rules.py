"""What is quantized, and with how many bits: ordered rules over module paths and operands."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import jax

from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.intercept import any_of, raise_unmatched
from jaxlab.quantizers.numerics.affine import AffineQuantizer
from jaxlab.quantizers.numerics.bit_widths import check_bits

Bits = int | jax.Array | None
Operand = Literal['kernel', 'input', 'output', 'embedding']
Granularity = Literal['tensor', 'channel', 'token', 'group']

# The first and last layers of all networks of `jaxlab.models`: their `anatomy(model).edges`.
EDGES = any_of(
  [
    *('conv1', 'conv_stem', 'patch_embed/proj', 'fc0'),
    *('fc', 'linear', 'classifier', 'head', 'head_dist', 'head/fc', 'lm_head'),
  ]
)


@dataclasses.dataclass(frozen=True)
class Rule:
  """The bit-width of one operand of all modules whose whole path matches a pattern.

  Methods take an ordered sequence of rules, of which the first that matches path and operand decides. What
  none matches is not quantized.

  Attributes:
    path: regular expression over whole module paths, e.g. `'blocks_.*/mlp/.*'`.
    operand: `'kernel'` of the module, its first `'input'`, its `'output'`, or the table of an `'embedding'`
      (which rules for kernels do not name; the input of a tied head goes with it).
    bits: a whole number from 1 to 16 (methods may take fewer), a traced scalar, or None (also 0): not
      quantized.
    granularity: what shares a scale: the `'tensor'`, a `'channel'`, a `'token'` (found anew at each call, of
      inputs and outputs), a `'group'` of inputs; None: what the method does by default.
    learned: whether the step is trained with the network.
    axes: of a kernel, in place of the outputs of its module: the axes of the array that have scales of their
      own 'per channel', e.g. `(-1,)` for `[..., in, out]`. For modules that are unknown here.
  """

  path: str
  operand: Operand
  bits: Bits
  granularity: Granularity | None = None
  learned: bool = False
  axes: tuple[int, ...] | None = None

  def __post_init__(self):
    if not isinstance(self.path, str):
      raise ValueError(f'path is a regular expression over module paths; got {self.path!r}.')
    try:
      re.compile(self.path)
    except re.error as error:
      raise ValueError(f'path {self.path!r} is no regular expression: {error}.') from None
    for name, options in (('operand', Operand), ('granularity', Granularity)):
      value = getattr(self, name)
      if value not in options.__args__ and (value is not None or name == 'operand'):
        raise ValueError(
          f'{name}={value!r} of the rule for {self.path!r} is none of '
          f'{", ".join(map(repr, options.__args__))}.'
        )
    if self.bits is not None:
      check_bits(self.bits, minimum=0)
    if self.axes is not None:
      if self.operand != 'kernel' or not all(isinstance(axis, int) for axis in self.axes):
        raise ValueError(
          f'axes of the rule for {self.path!r} are whole numbers, of a kernel; got {self.axes!r} for '
          f'{self.operand!r}.'
        )
      object.__setattr__(self, 'axes', tuple(self.axes))

  @property
  def off(self) -> bool:
    """Whether what it matches stays in float."""
    return self.bits is None or (isinstance(self.bits, int) and self.bits == 0)


Rules = Sequence[Rule]


def uniform_rules(
  weights: Bits = None,
  inputs: Bits = None,
  outputs: Bits = None,
  *,
  path: str = '.*',
  learned: bool = False,
) -> tuple[Rule, ...]:
  """Returns rules for the kernels, inputs and outputs of modules `path`; None leaves an operand alone.

  >>> [(rule.path, rule.operand, rule.bits) for rule in uniform_rules(2, inputs=4, path='blocks.*')]
  [('blocks.*', 'kernel', 2), ('blocks.*', 'input', 4)]
  """
  found = (('kernel', weights), ('input', inputs), ('output', outputs))
  return tuple(Rule(path, name, bits, learned=learned) for name, bits in found if bits is not None)


def edge_rules(
  weights: Bits,
  inputs: Bits | None,
  *,
  edges: str | Anatomy | None = EDGES,
  edge_bits: Bits = 8,
  learned: bool = False,
) -> tuple[Rule, ...]:
  """Returns `uniform_rules(weights, inputs)` with `edge_bits` for both at modules `edges`.

  Patch embedding or stem and the classifier at 8/8 are QwT's exceptions.

  Args:
    weights: bits of kernels.
    inputs: bits of inputs; None: inputs stay in float, those of the edges too.
    edges: `models.anatomy(model)`, whose `edges` are the exceptions; or their pattern, by default what they
      are called in the networks of this library; None makes none.
    edge_bits: of both at the exceptions.
    learned: see `Rule`.

  >>> rules = edge_rules(4, 4)
  >>> decide(rules, 'head', 'kernel').bits, decide(rules, 'blocks_0/mlp/fc1', 'kernel').bits
  (8, 4)
  """
  if isinstance(edges, Anatomy):
    edges = any_of(edges.edges) or None
  edge_inputs = None if inputs is None else edge_bits
  first = (
    () if edges is None else uniform_rules(edge_bits, edge_inputs, path=edges, learned=learned)
  )
  return (*first, *uniform_rules(weights, inputs, learned=learned))


def decide(rules: Rules, path: str, operand: Operand) -> Rule | None:
  """Returns the first rule that matches, or None where nothing is to be quantized."""
  for rule in rules:
    if rule.operand == operand and re.fullmatch(rule.path, path):
      return None if rule.off else rule
  return None


def quantizer_of(rule: Rule, default: AffineQuantizer) -> AffineQuantizer:
  """Returns a method's quantizer with the granularity of the rule, if it chooses one."""
  if rule.granularity in (None, default.granularity):
    return default
  return dataclasses.replace(default, granularity=rule.granularity, group_size=None)


def check_rules(rules: Rules, function: str) -> None:
  """Raises ValueError unless `rules` is a sequence of rules; an iterator would be empty the second time."""
  if not (isinstance(rules, Sequence) and all(isinstance(rule, Rule) for rule in rules)):
    raise ValueError(
      f"{function} takes a sequence of rules, e.g. [Rule('.*', 'kernel', 4)]; got {rules!r}."
    )


def check_accepted(
  rules: Rules,
  method: str,
  accepted: Mapping[Operand, Iterable[Granularity]],
  learned: bool = False,
) -> None:
  """Raises ValueError for what is no rule, or asks `method` for what it does not do; names both.

  Args:
    rules: of the user.
    method: its name.
    accepted: granularities of each operand that it quantizes.
    learned: whether its steps are learned.
  """
  check_rules(rules, method)
  for rule in rules:
    if rule.operand not in accepted:
      wrong = f'operand {rule.operand!r}'
    elif rule.granularity is not None and rule.granularity not in accepted[rule.operand]:
      wrong = f'granularity {rule.granularity!r}'
    elif rule.learned != learned and not rule.off:
      wrong = f'learned={rule.learned}'
    else:
      continue
    known = ', '.join(f'{name} (a {" or ".join(each)})' for name, each in accepted.items())
    raise ValueError(
      f'{method} cannot do Rule({rule.path!r}, {rule.operand!r}, {rule.bits}): {wrong}. It accepts {known}, '
      f'with learned={learned}.'
    )


def check_matches(
  rules: Rules, operand: Operand, paths: Sequence[str], tables: Sequence[str] = ()
) -> None:
  """Raises ValueError if a rule for `operand` matches none of `paths`; names it and the closest paths.

  One that matches an embedding, of `tables`, is told what its rule would be.
  """
  unmatched = [
    rule.path
    for rule in rules
    if rule.operand == operand and not any(re.fullmatch(rule.path, path) for path in paths)
  ]
  for pattern in unmatched:
    if any(re.fullmatch(pattern, table) for table in tables):
      raise ValueError(
        f'The {operand} rule {pattern!r} names a table, which is no {operand}: '
        f"Rule({pattern!r}, 'embedding', ...) does, in the methods that quantize tables."
      )
  if unmatched:
    raise_unmatched(unmatched, paths, f'{operand} rule', 'module')


def parse_bits(text: str) -> tuple[int, int]:
  """Returns (weight bits, activation bits) of a name such as `2w4a`.

  >>> parse_bits('2w4a')
  (2, 4)

  Raises:
    ValueError: if it is none.
  """
  found = re.fullmatch(r'(\d+)w(\d+)a', text)
  if not found:
    raise ValueError(f'bits are named such as 2w4a; got {text!r}.')
  return int(found[1]), int(found[2])
