"""Figures, views and the report: everything that is looked at."""
