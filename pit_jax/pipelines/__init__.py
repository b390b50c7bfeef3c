"""The systems: which stages they have, what each reads and leaves behind."""
