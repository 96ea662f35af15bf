"""Readers and writers of the layouts in which trained drafters are published."""
