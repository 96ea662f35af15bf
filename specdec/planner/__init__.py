"""Whether speculation will pay: costs measured here, acceptance, and the speed-up that follows."""
