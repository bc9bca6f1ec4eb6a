"""The results page: every table and figure of the four papers beside what was measured here.

``docs/results.md`` is written from the finished runs under ``docs/results``, and from nothing else.
"""

from vaelab.report import models, pelap, revelio, speed, suppression, turbo

SECTIONS = (models.SECTION, suppression.SECTION, pelap.SECTION, turbo.SECTION, revelio.SECTION, speed.SECTION)
"""The parts of the page, in order."""
