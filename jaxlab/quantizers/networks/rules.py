"""Which bit-width goes where: ordered rules over module paths."""

import dataclasses
import re
from collections.abc import Sequence

import jax

from jaxlab.models.intercept import raise_unmatched
from jaxlab.quantizers.numerics.affine import check_bits

Bits = int | jax.Array | None
Rules = Sequence[tuple[str, Bits]]


@dataclasses.dataclass(frozen=True)
class BitPolicy:
  """Bit-widths of weights and activations by module path.

  Each rule is `(pattern, bits)`; the first rule whose pattern matches a module's whole path decides. `bits`
  is a whole number from 1 to 16, a traced scalar, or None (also 0): not quantized. What no rule matches is
  not quantized.

  >>> policy = BitPolicy(weights=[('conv1', 8), ('.*', 4)], activations=[('.*relu', 4)])
  >>> (
  ...   policy.weight_bits('conv1'),
  ...   policy.weight_bits('layer1_0/conv1'),
  ...   policy.activation_bits('fc'),
  ... )
  (8, 4, None)

  Attributes:
    weights: rules over the modules that own a `kernel`.
    activations: rules over the modules whose output is quantized.
  """

  weights: Rules = ()
  activations: Rules = ()

  def __post_init__(self):
    for name in ('weights', 'activations'):
      for rule in getattr(self, name):
        if len(rule) != 2 or not isinstance(rule[0], str):
          raise ValueError(f'{name} holds rules (pattern, bits); got {rule!r}.')
        if rule[1] is not None:
          check_bits(rule[1], minimum=0)

  def weight_bits(self, path: str) -> Bits:
    """Returns the bit-width of the kernel of module `path`, or None."""
    return _first_match(self.weights, path)[1]

  def activation_bits(self, path: str) -> Bits:
    """Returns the bit-width of the output of module `path`, or None."""
    return _first_match(self.activations, path)[1]

  def activation_rule(self, path: str) -> tuple[str | None, Bits]:
    """Returns the rule that decides for the output of module `path`; `(None, None)` if there is none."""
    return _first_match(self.activations, path)


def _first_match(rules: Rules, path: str) -> tuple[str | None, Bits]:
  for pattern, bits in rules:
    if re.fullmatch(pattern, path):
      return pattern, None if isinstance(bits, int) and bits == 0 else bits
  return None, None


def check_rules(rules: Rules, paths: Sequence[str], what: str) -> None:
  """Raises ValueError if a rule's pattern matches none of `paths`; names it and the closest paths."""
  unmatched = [
    pattern for pattern, _ in rules if not any(re.fullmatch(pattern, path) for path in paths)
  ]
  if unmatched:
    raise_unmatched(unmatched, paths, f'{what} pattern', 'module')


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
