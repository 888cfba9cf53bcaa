"""Run folders and the papers' training schemes."""
