"""Other libraries' calls, answered by this one."""
