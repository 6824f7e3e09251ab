"""Every reference vector is read by some test."""

import pathlib
import re

from golden_vectors import DIR, OWN_DIR

CALL = re.compile(r"@golden\(\s*'([^']+)',\s*'([^']+)'")


def test_every_golden_file_is_read_by_a_test():
  here = pathlib.Path(__file__).parent
  read = {call for path in here.rglob('test_*.py') for call in CALL.findall(path.read_text())}
  papers = {path.parent.name for path in (here.parent / 'mlcollections_configs').glob('*/*.py')}
  # Elsewhere than in the project's own folder there may be vectors of papers that are not built yet.
  slugs = {path.name for path in DIR.iterdir() if path.is_dir()}
  slugs = slugs if DIR == OWN_DIR else slugs & (papers | {slug for slug, _ in read})
  unread = [
    f'{slug}/{path.name}'
    for slug in sorted(slugs)
    for path in sorted((DIR / slug).glob('*.npz'))
    if not any(slug == s and path.stem.startswith(piece) for s, piece in read)
  ]
  assert not unread, f'no @golden test reads {", ".join(unread)}'
