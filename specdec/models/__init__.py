"""Networks of trained drafters."""
