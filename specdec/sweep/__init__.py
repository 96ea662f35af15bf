"""Many settings, one table: axes, a resumable store, and the engine that runs the cells."""
