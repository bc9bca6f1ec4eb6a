"""The results page: every table and figure of the four papers beside what was measured here.

``docs/results.md`` is written from the finished runs under ``docs/results``, and from nothing else.
"""
