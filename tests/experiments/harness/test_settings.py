import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from experiments.harness import settings
from experiments.harness.overrides import override, parse
from experiments.harness.settings import fill, free, identity


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float
  kind: Literal['a', 'b'] = 'a'
  where: str = free('here')

  def check(self):
    if self.rate < 0:
      yield f'rate={self.rate}: expected >= 0.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
  inner: Inner
  maybe: Inner | None = None
  named: dict[str, Inner] = dataclasses.field(default_factory=dict)
  names: tuple[str, ...] = ()
  pair: tuple[int, float] = (1, 2.0)
  mean: float | tuple[float, ...] = 0.0
  limit: int | None = None
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  size: int = 3


def test_values_become_sections():
  found = fill(Outer, {'inner': {'rate': 1}, 'named': {'x': {'rate': 2.5}}, 'names': ['p', 'q']})
  assert found.inner == Inner(1.0) and type(found.inner.rate) is float
  assert found.named == {'x': Inner(2.5)} and found.names == ('p', 'q') and found.maybe is None


def test_all_that_is_wrong_is_said_at_once():
  values = {
    'inner': {'rat': 1.0, 'kind': 'c'},
    'named': {'x': {'rate': 'high'}},
    'pair': (1,),
    'size': 2.5,
    'sise': 3,
  }
  with pytest.raises(settings.SettingsError) as caught:
    fill(Outer, values)
  expected = (
    'sise: unknown key; expected size',
    'inner.rat: unknown key; expected rate',
    'inner.rate: missing; expected float',
    "inner.kind='c': expected one of 'a', 'b'",
    "named.x.rate='high': expected float, got str",
    'pair=(1,): expected tuple[int, float]',
    'size=2.5: expected int, got float',
  )
  for text in expected:
    assert text in str(caught.value), text
  assert len(caught.value.problems) == len(expected)


def test_problems_have_full_names():
  found = fill(Outer, {'inner': {'rate': -1.0}, 'named': {'x': {'rate': -2.0}}})
  assert list(settings.problems(found)) == [
    'inner.rate=-1.0: expected >= 0.',
    'named.x.rate=-2.0: expected >= 0.',
  ]


@pytest.mark.parametrize(
  ('text', 'kind', 'value'),
  [
    ('3', int, 3),
    ('3', tuple[int, ...], (3,)),
    ('3', float, 3.0),
    ('3', str, '3'),
    ('none', int | None, None),
    ('none', str | None, None),
    ('true', bool, True),
    ('["a","b"]', tuple[str, ...], ('a', 'b')),
    ('[a,b]', tuple[str, ...], ('a', 'b')),
    ('a', tuple[str, ...], ('a',)),
    ('4w4a,2w4a', tuple[str, ...], ('4w4a', '2w4a')),
    ('["4w4a"]', tuple[str, ...], ('4w4a',)),
    ("['a,b','c']", tuple[str, ...], ('a,b', 'c')),
    ("[it's,b]", tuple[str, ...], ("it's", 'b')),
    ('[1,2]', tuple[str, ...], ('1', '2')),
    ('[none,0.1]', tuple[float | None, ...], (None, 0.1)),
    (
      '[[kernel,[fsdp,none]]]',
      tuple[tuple[str, tuple[str | None, ...]], ...],
      (('kernel', ('fsdp', None)),),
    ),
    ('{a:[b,2]}', Mapping[str, Any], {'a': ('b', 2)}),
    ('[x]', str, '[x]'),
    ('inf', float, float('inf')),
    ('()', tuple[str, ...], ()),
    ('(1, 2)', tuple[int, float], (1, 2.0)),
    ('0.5', float | tuple[float, ...], 0.5),
    ('[0.5,0.25]', float | tuple[float, ...], (0.5, 0.25)),
    ('a', Literal['a', 'b'], 'a'),
    ("{'x': [1]}", Mapping[str, Any], {'x': (1,)}),
  ],
)
def test_texts_are_read_by_type(text, kind, value):
  assert parse(text, kind) == value and type(parse(text, kind)) is type(value)


@pytest.mark.parametrize(('text', 'kind'), [('x', int), ('1.5', int), ('c', Literal['a', 'b'])])
def test_texts_of_another_type_are_refused(text, kind):
  with pytest.raises(ValueError, match='expected'):
    parse(text, kind)


def test_what_is_wrong_within_a_text_is_named():
  expected = (
    r"^expected dict\[str, Inner\]; x.rate='high': expected float, got str. y.kin: unknown key"
  )
  with pytest.raises(ValueError, match=expected):
    parse('{x: {rate: high}, y: {rate: 1, kin: a}}', dict[str, Inner])


def test_values_may_be_given_in_place_of_texts():
  values = {'inner': {'rate': 1.0}, 'named': {'x': {'rate': 1.0}}}
  changes = {'names': ('a', 'b'), 'named.x.rate': 2, 'limit': '5', 'pair': [3, 4]}
  found = fill(Outer, override(Outer, values, changes))
  assert (found.names, found.named['x'].rate, found.limit, found.pair) == (
    ('a', 'b'),
    2.0,
    5,
    (3, 4.0),
  )
  with pytest.raises(settings.SettingsError, match=r"size='?2\.5'?: expected int"):
    fill(Outer, override(Outer, values, {'size': 2.5}))


def test_every_key_can_be_overridden():
  values = {'inner': {'rate': 1.0}, 'named': {'x': {'rate': 1.0}}, 'options': {'depth': 2}}
  pairs = ['inner.kind=b', 'named.x.rate=3', 'maybe.rate=2', 'options.width=4', 'limit=5']
  found = fill(Outer, override(Outer, values, pairs))
  assert found.inner == Inner(1.0, 'b') and found.named['x'] == Inner(3.0)
  assert (found.maybe, found.options) == (Inner(2.0), {'depth': 2, 'width': 4})
  assert found.limit == 5 and values['inner'] == {'rate': 1.0}


def test_a_field_changed_behind_its_section_leaves_the_others_as_given():
  pairs = ["inner={'rate': 2.0}", 'inner.kind=b', "maybe={'rate': 3.0}", 'maybe.kind=b']
  found = fill(Outer, override(Outer, {'inner': {'rate': 1.0}}, pairs))
  assert found.inner == Inner(2.0, 'b') and found.maybe == Inner(3.0, 'b')


@pytest.mark.parametrize(
  ('assignment', 'message'),
  [
    ('inner.rat=3', r'--config\.inner\.rat: unknown key\. Did you mean inner\.rate'),
    ('named.y.rate=3', 'unknown key'),
    ('size=many', r'--config\.size=many: expected int'),
    ('size', 'expected --config.key=value'),
  ],
)
def test_a_wrong_override_says_what_was_expected(assignment, message):
  with pytest.raises(settings.SettingsError, match=message):
    override(Outer, {'inner': {'rate': 1.0}}, [assignment])


def test_entries_of_a_mapping_that_holds_none_are_made_by_their_keys():
  @dataclasses.dataclass(frozen=True)
  class Option:
    rate: float = 1.0
    kind: str = 'a'

  @dataclasses.dataclass(frozen=True)
  class Whole:
    tuning: dict[str, Option] = dataclasses.field(default_factory=dict)
    heads: dict[str, Option] = dataclasses.field(default_factory=lambda: {'x': Option(2.0, 'b')})
    needed: dict[str, Inner] = dataclasses.field(default_factory=dict)

  found = fill(Whole, override(Whole, {}, ['tuning.y.rate=3', 'tuning.z.kind=b', 'heads.x.kind=c']))
  assert found.tuning == {'y': Option(3.0), 'z': Option(kind='b')}
  assert found.heads == {'x': Option(2.0, 'c')}  # what the default says stays
  for wrong in ('heads.y.rate=3', 'tuning.y.rat=3', 'needed.y.rate=3'):
    with pytest.raises(settings.SettingsError, match='unknown key'):
      override(Whole, {}, [wrong])
  with pytest.raises(settings.SettingsError, match=r'Did you mean tuning\.y\.rate'):
    override(Whole, {}, ['tuning.y.rat=3'])
  with pytest.raises(settings.SettingsError, match=r'tuning\.y\.rate: unknown key'):
    override(Whole, {'tuning': {'x': {}}}, ['tuning.y.rate=3'])


def test_the_identity_leaves_out_what_does_not_decide():
  one = fill(Outer, {'inner': {'rate': 1.0, 'where': 'there'}})
  other = fill(Outer, {'inner': {'rate': 1.0}})
  assert identity(one) == identity(other) != identity(dataclasses.replace(one, size=4))
  assert 'where' not in identity(one)['inner'] and identity(one)['inner']['rate'] == 1.0


def test_a_field_changed_within_a_default_section_leaves_what_that_default_says():
  @dataclasses.dataclass(frozen=True)
  class Middle:
    inner: Inner = dataclasses.field(default_factory=lambda: Inner(4.0, 'b', 'there'))
    size: int = 1

  @dataclasses.dataclass(frozen=True)
  class Whole:
    middle: Middle = dataclasses.field(default_factory=lambda: Middle(size=7))
    other: Inner | None = dataclasses.field(default_factory=lambda: Inner(2.0, 'b'))

  # Hints of classes within a function are found by value.
  for cls in (Middle, Whole):
    cls.__annotations__ = {
      'inner': Inner, 'size': int, 'middle': Middle, 'other': Inner | None
    }  # fmt: skip
  found = fill(Whole, override(Whole, {}, ['middle.inner.rate=3', 'other.rate=1']))
  assert found == Whole(Middle(Inner(3.0, 'b', 'there'), 7), Inner(1.0, 'b'))
  # A section that is given as a whole is what it says.
  assert fill(Whole, {'middle': {'size': 2}}).middle == Middle(size=2)
  assert fill(Whole, override(Whole, {'other': {'rate': 5.0}}, ['other.kind=a'])).other == Inner(
    5.0
  )
