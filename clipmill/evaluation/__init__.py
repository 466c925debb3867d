"""Scores of a run and the page that shows them: stages ``evaluate`` and ``report``."""
