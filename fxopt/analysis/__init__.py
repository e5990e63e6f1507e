"""Analyses: functions of a program, computed on demand through `Program.analysis` and dropped at the next edit."""
