"""One recorded trace, every setting: what target and drafter said, and what any rule would have made of it."""
