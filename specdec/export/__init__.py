"""Models as artefacts of ahead-of-time graphs: what `specdec export` writes, and what backends run without weights."""
