"""The parts of the results page, in order."""

from vaelab.report import models, pelap, revelio, speed, suppression, turbo

SECTIONS = (models.SECTION, suppression.SECTION, pelap.SECTION, turbo.SECTION, revelio.SECTION, speed.SECTION)
