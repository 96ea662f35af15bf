"""One recorded trace, every setting: `record` a run, `replay` lengths, trees, policies and rules without a model."""

from specdec.replay.engine import Replayed, replay
from specdec.replay.recorder import record
from specdec.replay.recording import Recording

__all__ = ["Recording", "Replayed", "record", "replay"]
