"""What runs saved engines in a process of its own, a file for each kind. None imports torch."""
