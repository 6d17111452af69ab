"""Measuring a model: teacher-forced scoring, translation quality, and how its experts are used."""
