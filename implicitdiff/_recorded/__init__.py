"""Recorded loops: one step of a search as a tape of instructions, run by the compiled machine."""
