"""Proof: what a run learned and what it forgot, of one run, of many subjects, and side by side."""
