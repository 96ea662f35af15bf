"""Models on the KV runtime: sessions, the slot cache, and the backends that run a step."""

from specdec.runtime.backend import Backend, Capabilities
from specdec.runtime.session import Session

__all__ = ["Backend", "Capabilities", "Session"]
