"""Measurements, beside what others do in the same run: most are commands of ``swarmcore bench``."""
